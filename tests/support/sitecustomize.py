"""Python runs this at the start of every process of the `cli` fixture, which puts it on PYTHONPATH."""

from torchvision_schemas import install

install()
