import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from meap_lit.data.corpora.facts import FactCorpus
from meap_lit.data.prepare import sources
from meap_lit.data.prepare.chat import PrepareChat
from meap_lit.data.prepare.step import Preparation
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.prepare.tokenizer import TrainTokenizer
from meap_lit.data.pretraining import PretrainingData
from meap_lit.errors import UserError
from meap_lit.files import is_partial, new_folder, partial_path


@dataclass(kw_only=True)
class Write(Preparation):
    text: str
    ending: str = ""
    num_workers: int = field(default=1, compare=False)

    def make(self, folder):
        if self.text == "fail":
            raise UserError("as asked")
        (folder / "result.txt").write_text(self.text)
        return f"wrote {self.text}"


@dataclass(kw_only=True)
class Other(Write):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_run_makes_the_folder_and_says_so(tmp_path, capsys):
    Write(output=str(tmp_path / "deep" / "out"), text="hello").run()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["preparation.json", "result.txt"]
    assert capsys.readouterr().out == "wrote hello\n"


def test_run_refuses_an_existing_output(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.bin").write_text("precious")
    with pytest.raises(UserError, match="exists already; remove it or name another"):
        Write(output=str(tmp_path / "out"), text="hello").run()
    assert names(tmp_path / "out") == ["mine.bin"]


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="as asked"):
        Write(output=str(tmp_path / "out"), text="fail").run()
    assert names(tmp_path) == []


@dataclass(kw_only=True)
class Overtaken(Write):
    """Another process makes the same folder, of another text perhaps, before this one has finished."""

    recorded_as = "Write"
    theirs: str = field(compare=False)

    def make(self, folder):
        Write(output=f"{self.output}.theirs", text=self.theirs).run()
        os.rename(f"{self.output}.theirs", self.output)
        return super().make(folder)


def test_what_another_process_makes_meanwhile_is_taken(tmp_path):
    Overtaken(output=str(tmp_path / "out"), text="hello", theirs="hello").ensure()
    assert names(tmp_path) == ["out"]
    with pytest.raises(UserError, match="was made with text = 'other', the recipe says 'hello'"):
        Overtaken(output=str(tmp_path / "other"), text="hello", theirs="other").ensure()


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make folder \S+/file/out: Not a directory"):
        Write(output=str(tmp_path / "file" / "out"), text="hello").run()


def test_ensure_runs_once_and_compares(tmp_path, capsys):
    output = str(tmp_path / "out")
    Write(output=output, text="hello").ensure()
    Write(output=output, text="hello", num_workers=7).ensure()
    assert capsys.readouterr().out == "wrote hello\n"
    with pytest.raises(UserError, match="made with text = 'hello', the recipe says 'bye'"):
        Write(output=output, text="bye").ensure()
    with pytest.raises(UserError, match="was made by Write, not Other"):
        Other(output=output, text="hello").ensure()
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match="exists but was not made by meap_lit"):
        Write(output=str(tmp_path / "foreign"), text="hello").ensure()


def test_what_is_made_of_a_source_that_changed_is_refused_down_the_chain(tmp_path):
    corpus, made, dataset = (str(tmp_path / name) for name in ("corpus", "tokenizer", "dataset"))

    def steps(num_documents):
        yield FactCorpus(output=corpus, num_documents=num_documents)
        yield TrainTokenizer(output=made, input=[corpus], vocab_size=300)
        yield PrepareText(output=dataset, input=[f"{corpus}/*.jsonl"], tokenizer=made, num_workers=1)

    for _ in range(2):
        for step in steps(20):
            step.ensure()
    shutil.rmtree(corpus)
    for step in steps(20):
        step.ensure()  # the same corpus again
    shutil.rmtree(corpus)
    first, *others = steps(30)
    first.ensure()
    for step in others:
        step.ensure(check_sources=False)
        message = (
            rf"^folder {step.output} was made of other files than its sources hold now; remove it to make it again"
        )
        with pytest.raises(UserError, match=message):
            step.ensure()
        shutil.rmtree(step.output)
        step.ensure()


def test_files_of_the_user_that_change_are_noticed_and_those_that_go_are_not_needed(tmp_path, tokenizer_folder):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("one")
    (source / "b.txt").write_text("two")
    options = {"tokenizer": tokenizer_folder, "num_workers": 1}
    step = PrepareText(output=str(source / "out"), input=[str(source)], **options)  # inside of what it reads
    step.ensure()
    (source / "notes.pdf").write_text("not read")
    step.ensure()
    (source / "c.txt").write_text("three")
    with pytest.raises(UserError, match=f"^folder {source / 'out'} was made of other files"):
        step.ensure()
    record = source / "out" / "preparation.json"
    before = json.loads(record.read_text())
    record.write_text(json.dumps({name: before[name] for name in ("step", "arguments")}))  # of version 0.1
    step.ensure()
    record.write_text(json.dumps(before))
    moved = tmp_path / "moved"
    source.rename(moved)
    (moved / "c.txt").unlink()
    record = moved / "out" / "preparation.json"
    for paths in ([str(moved)], [f"{moved}/*.txt"]):
        record.write_text(json.dumps(before | {"arguments": before["arguments"] | {"input": paths}}))
        PrepareText(output=str(moved / "out"), input=paths, **options).ensure()
    for file in moved.glob("*.txt"):
        file.unlink()
    PrepareText(output=str(moved / "out"), input=paths, **options).ensure()


def test_an_edit_that_keeps_the_size_is_noticed_and_a_copy_is_not(tmp_path, tokenizer_folder, monkeypatch):
    source, output = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("one " * 25)
    step = PrepareText(output=str(output), input=[str(source)], tokenizer=tokenizer_folder, val_share=0, num_workers=1)
    step.ensure()
    record, manifest = (output / name for name in ("preparation.json", "manifest.json"))
    hashed = []
    read = sources.hash_file
    monkeypatch.setattr(sources, "hash_file", lambda *args: hashed.append(args[0]) or read(*args))
    step.ensure()
    assert not hashed, "a file whose time has not changed is not hashed again"
    before = record.read_bytes(), manifest.read_bytes()
    shutil.copy(source, tmp_path / "copy.txt")
    (tmp_path / "copy.txt").rename(source)
    hashed.clear()
    step.ensure()
    assert hashed
    assert record.read_bytes() != before[0]  # has the new time
    assert manifest.read_bytes() == before[1]
    hashed.clear()
    step.ensure()
    assert not hashed
    source.write_text("two " * 25)
    with pytest.raises(UserError, match=f"^folder {output} was made of other files than its sources hold now"):
        step.ensure()
    step.ensure(check_sources=False)
    source.unlink()
    step.ensure()


def state(path, sha256, size=5):
    return sources.SourceFile(path, size, 0, sha256)


def test_a_file_that_is_not_read_hides_no_edit_of_another_of_its_name():
    before = [state("a/x.txt", "1"), state("b/x.txt", None)]
    assert sources.is_same(before, [state("a/x.txt", "1"), state("b/x.txt", None)])
    assert not sources.is_same(before, [state("a/x.txt", "2"), state("b/x.txt", None)])
    assert sources.is_same([state("a/x.txt", "1")], [state("copy/x.txt", "1")])
    assert not sources.is_same([state("a/x.txt", "1")], [state("copy/x.txt", "2")])


def test_a_file_that_cannot_be_read_once_is_known_by_its_hash_later(tmp_path, tokenizer_folder, monkeypatch):
    source, output = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("one")
    step = PrepareText(output=str(output), input=[str(source)], tokenizer=tokenizer_folder, val_share=0, num_workers=1)
    step.ensure()
    os.utime(source, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "hash_file", lambda *args: None)
        step.ensure()
    source.write_text("two")
    with pytest.raises(UserError, match="was made of other files"):
        step.ensure()


def test_pieces_of_a_large_file_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE", 10)
    monkeypatch.setattr(sources, "_NUM_PIECES", 4)
    file, content = tmp_path / "x", bytearray(range(100))

    def hash_of(place=None):
        file.write_bytes(bytes(0 if number == place else byte for number, byte in enumerate(content)))
        return sources.hash_file(file)

    assert [place for place in range(100) if hash_of(place) == hash_of()] == [
        *[0],  # a zero already
        *[*range(10, 30), *range(40, 60), *range(70, 90)],
    ]
    content = content[:40]
    assert hash_of() == hashlib.sha256(content).hexdigest()


def test_an_edited_template_of_the_same_size_is_noticed(tmp_path, tokenizer_folder):
    source, template = tmp_path / "in.jsonl", tmp_path / "own.jinja"
    source.write_text('{"instruction": "Go on?", "output": "Yes."}\n')
    template.write_text("{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}")
    options = {"input": [str(source)], "tokenizer": tokenizer_folder, "template": str(template), "val_share": 0}
    step = PrepareChat(output=str(tmp_path / "out"), num_workers=1, **options)
    step.ensure()
    step.ensure()
    template.write_text(template.read_text().replace("message", "massage"))
    with pytest.raises(UserError, match="was made of other files than its sources hold now"):
        step.ensure()


def test_a_dataset_of_an_earlier_version_is_compared_by_sizes(tmp_path, tokenizer_folder):
    source, output = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("one")
    step = PrepareText(output=str(output), input=[str(source)], tokenizer=tokenizer_folder, val_share=0, num_workers=1)
    step.ensure()
    record = json.loads((output / "preparation.json").read_text())
    assert [Path(file["path"]).name for file in record.pop("files")] == ["in.txt"]
    (output / "preparation.json").write_text(json.dumps(record))
    source.write_text("two")
    step.ensure()
    source.write_text("three")
    with pytest.raises(UserError, match="was made of other files"):
        step.ensure()
    source.write_text("two")
    for files in (7, [7], [{"path": "in.txt"}], [{"path": "in.txt", "bytes": 3, "time": "now", "sha256": None}]):
        (output / "preparation.json").write_text(json.dumps(record | {"files": files}))
        with pytest.raises(UserError, match=rf"^{output}/preparation.json is damaged; remove {output} and make it"):
            step.ensure()


def test_a_file_that_comes_while_others_are_read_is_noticed(tmp_path, tokenizer_folder):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("one")

    class Slow(PrepareText):
        recorded_as = "PrepareText"

        def make(self, folder):
            summary = super().make(folder)
            (source / "b.txt").write_text("two")
            return summary

    options = {"input": [str(source)], "tokenizer": tokenizer_folder, "val_share": 0, "num_workers": 1}
    Slow(output=str(tmp_path / "out"), **options).ensure()
    with pytest.raises(UserError, match="was made of other files"):
        PrepareText(output=str(tmp_path / "out"), **options).ensure()


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Write(output="~/out", text="hello").run()
    assert names(tmp_path) == ["out"]
    assert list(PretrainingData("~/out", "tokenizer").datasets) == [str(tmp_path / "out")]


def test_a_folder_of_an_older_version_lacks_options_that_have_a_default(tmp_path):
    output = tmp_path / "out"
    Write(output=str(output), text="hello").run()
    record = output / "preparation.json"
    record.write_text(json.dumps({"step": "Write", "arguments": {"text": "hello"}}))
    Write(output=str(output), text="hello").ensure()
    with pytest.raises(UserError, match="made with ending = '', the recipe says '!'"):
        Write(output=str(output), text="hello", ending="!").ensure()


def dead_process():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_only_what_an_ended_run_left_behind_is_removed(tmp_path):
    dead, host = dead_process(), partial_path(tmp_path / "out").name.partition("@")[2]
    kept = [f"out.partial-{os.getppid()}@{host}", f"out.partial-{dead}@elsewhere", "out.partial-mine"]
    kept.append(f"other.partial-{dead}@{host}")
    old = f"out.partial-{dead}@elsewhere.org"
    for name in (*kept, f"out.partial-{dead}@{host}", f"out.partial-{os.getpid()}@{host}", old):
        (tmp_path / name / "train").mkdir(parents=True)
    for folder in (tmp_path / old / "train", tmp_path / old):
        os.utime(folder, (0, 0))
    Write(output=str(tmp_path / "out"), text="hello").run()
    assert names(tmp_path) == sorted([*kept, "out"])


def test_a_folder_is_partial_until_it_has_its_name(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        assert is_partial(folder)
    assert not is_partial(tmp_path / "out")
    assert not is_partial(tmp_path / "my.partial-results")
    assert is_partial(tmp_path / "out.partial-0123abcd")  # of version 0.1


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    output = tmp_path / "out"
    theirs = output / "theirs"
    with pytest.raises(UserError, match="appeared while it was being made"), new_folder(output):
        os.makedirs(theirs)
    assert names(tmp_path) == ["out"]
    assert names(output) == ["theirs"]


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no space left to make"), new_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_a_disk_that_is_full_from_the_start_keeps_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    with pytest.raises(UserError, match=r"cannot make folder .*out: No space left"), new_folder(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())
