"""A device mesh as random streams see one, without ranks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Mesh:
    """Names of the dims and this rank's coordinates; ``None`` for a rank outside the mesh."""

    mesh_dim_names: tuple[str, ...] | None
    at: tuple[int, ...] | None
    device_type: str = "cpu"

    def get_coordinate(self) -> list[int] | None:
        return None if self.at is None else list(self.at)
