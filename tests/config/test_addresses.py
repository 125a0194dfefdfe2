"""Addresses where only a file will do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models.config import find_config
from models.places import resolve_weights
from utils.config.addresses import refuse_address
from utils.config.dataset import load_dataset_config, load_names
from utils.config.hyperparameters import load_hyperparameters
from utils.errors import UserError


@pytest.mark.parametrize(
    ("take", "name"),
    [
        (resolve_weights, "yolov5s.pt"),
        (find_config, "yolov5s.yaml"),
        (load_names, "bccd.yaml"),
        (load_dataset_config, "bccd.yaml"),
        (load_hyperparameters, "hyp.scratch.yaml"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])  # a path of options has lost a slash
def test_an_address_in_place_of_a_file_is_refused_as_one(
    take: Callable[[object], object], name: str, kind: type
) -> None:
    for scheme in ("https", "HTTP"):
        with pytest.raises(UserError) as error:
            take(kind(f"{scheme}://me:secret@127.0.0.1:9/data/{name}"))
        assert str(error.value) == (
            f"{scheme}://127.0.0.1:9/data/{name}: is an address, which is not taken here; "
            "download it and give the path of the file"
        )


@pytest.mark.parametrize("name", ["a.pt", "/http/a.pt", "C:/a.pt", "http:a.pt", "my/http://a.pt"])
def test_paths_are_no_addresses(name: str) -> None:
    refuse_address(name)
    refuse_address(Path(name))
