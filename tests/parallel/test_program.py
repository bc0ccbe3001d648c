"""What makes two processes run the same program."""

import json

from flax_alexnet.parallel.program import program, settings


def test_a_program_is_its_code_its_packages_and_the_settings_of_jax(monkeypatch, tmp_path):
    about, name = program(), "the digest of the code of flax_alexnet"
    assert about == program()
    assert {name, "the version of jaxlib", *settings()} < about.keys()
    assert about["jax.enable_x64"] is False
    json.dumps(about)
    monkeypatch.setattr("flax_alexnet.parallel.program.__file__", str(tmp_path / "x" / "x.py"))
    codes = []
    (tmp_path / "models").mkdir()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "models" / "alexnet.py").write_text(text)
        codes.append(program()[name])
    assert len({about[name], *codes}) == 3
