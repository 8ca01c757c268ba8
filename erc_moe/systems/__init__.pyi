"The systems that the papers' tables compare with, a module each."
from .hcam import Hcam, HcamConfig, HcamOutput
