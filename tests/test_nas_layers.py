"""Two processes that are the first to import NNI's NAS."""

import shutil
import subprocess
import sys
from pathlib import Path

import nni
import pytest

WRITE = "            fp.write(code)\n"
SLOWLY = """\
            fp.write(code[:len(code) // 2])
            fp.flush()
            import time
            time.sleep(2)
            fp.write(code[len(code) // 2:])
"""
PLAIN = "import nni.nas.nn.pytorch"
OURS = "from nni_darts_rnn.nas_layers import import_layers; import_layers()"
AT_THE_FILE = """\
import nni, pytorch_lightning, sys, time
from pathlib import Path
until = time.monotonic() + 60
while not (Path(sys.argv[1]).exists() and Path(sys.argv[1]).stat().st_size) and time.monotonic() < until:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("way, ends", [(PLAIN, "SyntaxError"), (OURS, None)], ids=["as_nni_does_it", "ours"])
def test_the_second_to_import_waits_for_the_first(tmp_path, way, ends):
    """The first of them is NNI's own fault: once it fails, `nas_layers` can go."""
    shutil.copytree(Path(nni.__file__).parent, tmp_path / "nni", ignore=shutil.ignore_patterns("_layers.py", "__pycache__"))
    source = tmp_path / "nni" / "nas" / "nn" / "pytorch" / "layers.py"
    text = source.read_text()
    assert WRITE in text
    source.write_text(text.replace(WRITE, SLOWLY))
    made = source.with_name("_layers.py")
    pythonpath = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", pythonpath + way]) as first:
        second = subprocess.run([sys.executable, "-W", "ignore", "-c", pythonpath + AT_THE_FILE + way, made], stderr=subprocess.PIPE, text=True)
    assert first.returncode == 0 and made.exists()
    assert (ends in second.stderr) if ends else second.returncode == 0, second.stderr
    compile(made.read_text(), "_layers.py", "exec")
    assert source.read_text() == text.replace(WRITE, SLOWLY)  # it served as the lock


def test_nothing_to_write_in(tmp_path, monkeypatch):
    from nni_darts_rnn import nas_layers

    def refused(path):
        raise PermissionError(path)

    monkeypatch.setattr(nas_layers, "hold", refused)
    nas_layers.import_layers()
    assert "nni.nas.nn.pytorch" in sys.modules
