"""Of all tests: examples in Markdown write their files to a folder of their own."""

import pytest

collect_ignore_glob = ["docs/conf.py", "docs/_ext/*"]


@pytest.fixture(autouse=True)
def _own_folder_of_an_example(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.path.suffix == ".md":
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
