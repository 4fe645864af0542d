"""Read by every Python that has this folder on its path: plants what the environment asks for."""

from planting import plant_from_environment

plant_from_environment()
