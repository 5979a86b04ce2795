"Build metadata from settings.ini; the version is in llm_scratch/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']
init = (root/lib/'__init__.py').read_text(encoding='utf-8')

setup(
    version=re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", init, re.M)[1],
    author=cfg['author'],
    license=cfg['license'],
    keywords=cfg['keywords'].split(),
    classifiers=[f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)],
    packages=find_packages(include=[lib, f'{lib}.*']),
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{lib}={lib}._modidx:d']),
)
