"The systems that the papers' tables compare with, a module each."
