def test_a(uft, request_of, tmp_path, curve, result):
    done = uft("train", *request_of("sft", ["demonstrations", "pairs"]), f"run.dir={tmp_path/'run'}", code=None)
    print(done.returncode, done.stdout, done.stderr)
    print(curve(tmp_path/'run'), result(tmp_path/'run'))
    assert 0
