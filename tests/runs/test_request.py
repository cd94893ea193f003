"""The request of a run: what its file keeps about weights in a file, and requests of older versions."""

from __future__ import annotations

import json

import pytest

from dcafy.errors import CheckpointError
from dcafy.runs.request import REQUEST, Request, read_request, write_request


def test_a_request_keeps_where_in_a_file_the_weights_are(tmp_path):
    asked = Request("w.pth", "digits", "timm:resnet18", prefix="teacher.backbone", ignore_head=True)
    write_request(tmp_path, asked)
    assert read_request(tmp_path) == asked


def test_a_request_from_before_there_were_such_places(tmp_path):
    write_request(tmp_path, Request("w.pth", "digits"))
    data = json.loads((tmp_path / REQUEST).read_text())
    del data["prefix"], data["ignore_head"]
    (tmp_path / REQUEST).write_text(json.dumps({**data, "version": 1}))
    assert read_request(tmp_path) == Request("w.pth", "digits")


@pytest.mark.parametrize(("name", "value"), [("message", "x"), ("schema", "softMax"), ("reduction", -1)])
def test_a_request_with_another_value_is_damaged_and_named(tmp_path, name, value):
    write_request(tmp_path, Request("w.pth", "digits"))
    data = json.loads((tmp_path / REQUEST).read_text())
    data["conversion"][name] = value
    (tmp_path / REQUEST).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"finetune\.json' is damaged: {name}.*[^.]\. Start the run anew\."):
        read_request(tmp_path)
