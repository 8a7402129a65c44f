"""What is written takes the place of plain files alone: devices, pipes and links stay what they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from special_files import KINDS

from metapl import MetaplError
from metapl.apps.machine.sealed import replacing, write_whole
from metapl.runs import checkpoint


@pytest.mark.parametrize("through", ["itself", "a link"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_file_is_never_replaced(kind: str, through: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    KINDS[kind](there)
    given = there
    if through == "a link":
        given = tmp_path / "link"
        given.symlink_to(there)
    before, names = os.lstat(there), sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match=f"it is a {kind}, expected a plain file"), replacing(given) as file:
        file.write(b"lost")
    with pytest.raises(checkpoint.CheckpointError, match="could not be written"):
        checkpoint.save(given, {"step": 1})
    if kind != "socket":  # its name would be the folder's
        given.rename(tmp_path / "recipe.json")
        with pytest.raises(MetaplError, match=f"recipe.json could not be written: it is a {kind}"):
            write_whole(tmp_path / "recipe.json", b"{}", "mend that")
        (tmp_path / "recipe.json").rename(given)
    after = os.lstat(there)
    assert (after.st_mode, after.st_ino, after.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
    assert sorted(os.listdir(tmp_path)) == names


def test_the_file_that_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link, chain = tmp_path / "elsewhere" / "target", tmp_path / "link", tmp_path / "chain"
    target.write_text("before")
    link.symlink_to("elsewhere/target")
    chain.symlink_to(link)
    with replacing(chain) as file:
        file.write(b"after")
    assert target.read_text() == "after"
    assert link.is_symlink()
    assert chain.is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["target"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to("elsewhere/new")
    with replacing(dangling) as file:
        file.write(b"new")
    assert (tmp_path / "elsewhere" / "new").read_text() == "new"
