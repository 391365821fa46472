"""Building a generation whose vectors lie in a server, by the workers of a Ray cluster (docs/distributed.md).

`LiveIndex.build(checkpoint, ray=RayPool(...))`, or `ultrarag index build PATH CHECKPOINT --ray ADDRESS`.
"""

from ultrarag.retrieve.on_ray.pool import RayPool

__all__ = ["RayPool"]
