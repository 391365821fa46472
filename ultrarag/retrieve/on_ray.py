"""Where the workers of a Ray build are named: `from ultrarag.retrieve.on_ray import RayPool`."""

from ultrarag.encode.ray import RayPool

__all__ = ["RayPool"]
