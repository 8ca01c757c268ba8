"""Everything that pyproject.toml calls dynamic, read from settings.ini: the one place for names,
versions and requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {
    name.removesuffix("_requirements"): value.split()
    for name, value in cfg.items()
    if name.endswith("_requirements")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
        "Natural Language :: English", "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["erc_moe", "erc_moe.*"]),
    package_data={
        "erc_moe": [
            "__init__.pyi", "*/__init__.pyi", "learning_rates.csv", "page_assets/*",
            "pretrained/*/*", "pretrained/*/*/*", "sample/*", "sample/audio/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg.get("console_scripts", "").split(),
        "nbdev": ["erc_moe=erc_moe._modidx:d"]},
    zip_safe=False)
