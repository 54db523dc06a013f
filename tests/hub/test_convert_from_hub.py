"""A release that is converted by its Hub id, through the real client."""

import filecmp
import subprocess
import sys

from hub_server import HubServer, client_environment

CHECKPOINT = ("*.safetensors", "*.json")


def test_a_hub_id_is_converted_as_its_folder(golden, tmp_path):
    release = golden / "deepseek_v41_tiny"
    files = {path.name: path for pattern in CHECKPOINT for path in release.glob(pattern)}
    del files["golden.safetensors"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, path in files.items():
        (folder / name).symlink_to(path)
    with HubServer(tmp_path / "hub") as hub:
        stored = {name: hub.store(path.read_bytes()) for name, path in files.items()}
        revision = hub.create("org/tiny").commit("main", "release", stored)
        hub.repository("org/tiny").commit("main", "emptied", {})
        for source, target in ((["org/tiny", "--revision", revision], "from-hub"), ([str(folder)], "from-folder")):
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "engram_hf.convert_scripts.convert_deepseek_v41",
                    source[0],
                    target,
                    *source[1:],
                ],
                cwd=tmp_path,
                env=client_environment(hub, tmp_path / "home"),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
    made, expected = tmp_path / "from-hub", tmp_path / "from-folder"
    names = sorted(path.relative_to(expected).as_posix() for path in expected.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(made, expected, names, shallow=False) == (names, [], [])
