import inspect
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from meap_lit.callbacks import Budget, RetrievalProbe
from meap_lit.callbacks.metrics import MetricsTable
from meap_lit.data.finetuning import FineTuningData
from meap_lit.data.pretraining import PretrainingData
from meap_lit.errors import UserError
from meap_lit.modules import MEAPFineTuning, MEAPPretraining
from meap_lit.report.arms import describe, find_studies
from meap_lit.report.runs import RATIO, find_runs
from tests.support.toy_study import DECODER, recipe, write_run, write_table


def studies_of(folder, *configs):
    for number, config in enumerate(configs):
        write_run(folder / f"{number:02}", config)
    return find_studies(find_runs([str(folder)]))


def test_runs_that_differ_in_seed_and_machine_are_one_arm(tmp_path):
    (study,) = studies_of(
        tmp_path,
        recipe("ntp_s1", 1, 0),
        recipe("ntp_s2", 2, 0.0, trainer__devices=2, data__init_args__num_workers=4),
        recipe("meap_s1", 1, 0.15),
        recipe("meap_s2", 2, 0.15, model__init_args__compile=True),
        recipe("meap_s3", 3, 0.15),
    )
    ntp, meap = study.arms
    assert [(arm.name, list(arm.runs)) for arm in study.arms] == [("ntp", ["1", "2"]), ("meap", ["1", "2", "3"])]
    assert ntp.is_plain
    assert ntp.baseline is None
    assert meap.baseline is ntp
    assert study.at_ratio(0.15) is meap
    assert describe(meap.differs_from(ntp)) == "mask_ratio 0.15"
    assert [seed for seed, _, _ in meap.pairs(ntp)] == ["1", "2"]
    assert study.title == "Pretraining, 66 parameters"


@pytest.mark.parametrize(
    "kind", [MEAPPretraining, MEAPFineTuning, PretrainingData, FineTuningData, Budget, RetrievalProbe]
)
def test_what_does_not_decide_a_result_is_an_option(kind):
    options = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    assert kind.incidental
    assert set(kind.incidental) <= options


def test_a_run_of_an_earlier_version_is_one_of_its_arm(tmp_path):
    old = recipe("meap_s2", 2)
    del old["model"]["init_args"]["mask_ratio"]
    old["model"]["init_args"]["mask"] = {"class_path": "meap_lit.masking.Constant", "init_args": {"ratio": 0.15}}
    (study,) = studies_of(tmp_path, recipe("ntp_s1", 1, 0), recipe("meap_s1", 1, 0.15), old)
    assert [(arm.name, arm.ratio, list(arm.runs)) for arm in study.arms] == [
        ("ntp", 0, ["1"]),
        ("meap", 0.15, ["1", "2"]),
    ]


def test_ablation_and_variants(tmp_path):
    (study,) = studies_of(
        tmp_path,
        *(recipe(f"p{ratio}", 1, ratio) for ratio in (0.15, 0, 0.05)),
        recipe("released", 1, 0.15, model__init_args__mask_scope="batch"),
        recipe("ramp", 1, schedule={"class_path": "meap_lit.masking.Linear", "init_args": {"end": 0.15}}),
    )
    assert [arm.name for arm in study.arms] == ["p0", "p0.05", "p0.15", "released", "ramp"]
    assert [arm.name for arm in study.ablation] == ["p0.05", "p0.15"]
    assert study.at_ratio(0.15).name == "p0.15"
    assert [arm.name for arm in study.rivals(study.at_ratio(0.15))] == ["p0.05"]
    ramp = study.arms[-1]
    assert ramp.ratio is None
    assert not ramp.is_plain


def test_equal_names_are_told_apart(tmp_path):
    recipes = [recipe("run", 1, 0), recipe("run", 1, 0.1), recipe("run", 1, 0.1, budget__max_steps=9)]
    (study,) = studies_of(tmp_path, *recipes)
    assert sorted(arm.name for arm in study.arms) == ["run P=0", "run P=0.1 (1)", "run P=0.1 (2)"]


def test_each_arm_is_compared_with_the_nearest_plain_one(tmp_path):
    long = {"budget__max_steps": 60}
    (study,) = studies_of(
        tmp_path,
        *(recipe("ntp", 1, 0), recipe("ntp_long", 1, 0, **long)),
        *(recipe("meap", 1, 0.15), recipe("meap_long", 1, 0.15, **long)),
    )
    assert {arm.name: arm.baseline.name for arm in study.masked} == {"meap": "ntp", "meap_long": "ntp_long"}


def test_copies_without_masks_are_an_arm_of_their_own(tmp_path):
    copies = {"fine_tuning": True, "data__init_args__duplication": {"mask_ratio": 0.1, "mask_inputs": False}}
    recipes = [recipe("plain", 1, 0, fine_tuning=True), recipe("copies", 1, **copies)]
    (study,) = studies_of(tmp_path / "without", *recipes)
    assert study.at_ratio(0.1) is None, "it says nothing about masks"
    (study,) = studies_of(tmp_path / "with", *recipes, recipe("concat", 1, 0.1, fine_tuning=True))
    assert study.at_ratio(0.1).name == "concat"
    assert {arm.name: arm.baseline.name for arm in study.masked} == {"copies": "plain", "concat": "plain"}


def test_fine_tuning_is_grouped_by_the_arm_that_it_started_from(tmp_path):
    starts = [recipe("ntp", 1, 0), recipe("ntp", 2, 0), recipe("meap", 1, 0.15), recipe("meap", 2, 0.15)]
    tuned = [
        recipe(f"sft_{number}", 1, ratio, fine_tuning=True, init_from=str(tmp_path / f"{number:02}"))
        for number in range(4)
        for ratio in (0, 0.1)
    ]
    pretraining, of_ntp, of_meap = studies_of(tmp_path, *starts, *tuned)
    assert pretraining.title.startswith("Pretraining")
    assert [study.title for study in (of_ntp, of_meap)] == ["Fine-tuning of ntp", "Fine-tuning of meap"]
    for study in (of_ntp, of_meap):
        plain, masked = study.arms
        # the second run started from seed 2 and has seed 1 itself
        assert list(plain.runs) == list(masked.runs) == ["1", "2/1"]
        assert study.at_ratio(0.1) is masked
        assert masked.baseline is plain
        assert describe(masked.differs_from(plain)) == "duplication.mask_ratio 0.1"


def test_a_run_that_masked_before_it_was_resumed_is_not_plain(tmp_path):
    first = write_run(tmp_path / "annealed/version_0", recipe("annealed", 1, 0.15), saved=20)
    resumed = recipe("annealed", 1, 0, ckpt_path=str(first / "checkpoints" / "step=20.ckpt"))
    write_run(tmp_path / "annealed/version_1", resumed)
    write_run(tmp_path / "ntp", recipe("ntp", 1, 0))
    (study,) = find_studies(find_runs([str(tmp_path)]))
    plain, annealed = study.arms
    assert (plain.name, annealed.name, annealed.baseline) == ("ntp", "annealed", plain)
    assert annealed.differs_from(plain) == {"before model.mask_ratio": 0.15}


def test_the_logged_ratio_tells_that_a_run_masked_before_it_was_resumed_in_its_folder(tmp_path):
    folder = tmp_path / "annealed/main"
    resumed = recipe("annealed", 1, 0, ckpt_path=str(folder / "checkpoints/step=20.ckpt"))
    write_run(folder, resumed)
    write_table(folder, {"val/loss": (3.0, 2.0), RATIO: (0.15, 0.15)}, first_step=10)
    write_table(folder, {"val/loss": (1.0,), RATIO: (0.0,)}, first_step=30)
    write_run(tmp_path / "ntp", recipe("ntp", 1, 0))
    (study,) = find_studies(find_runs([str(tmp_path)]))
    plain, annealed = study.arms
    assert (plain.name, annealed.name, annealed.baseline) == ("ntp", "annealed", plain)
    assert annealed.differs_from(plain) == {"before model.mask_ratio": 0.15}


def test_a_run_that_was_moved_keeps_what_it_was_before_it_was_resumed(tmp_path):
    first = write_run(tmp_path / "runs/m/version_0", recipe("m", 1, 0.15), saved=20)
    resumed = recipe("m", 1, 0, ckpt_path=str(first / "checkpoints" / "step=20.ckpt"))
    write_run(tmp_path / "runs/m/version_1", resumed, first_step=30)
    (tmp_path / "runs").rename(tmp_path / "archive")
    write_run(tmp_path / "archive/ntp", recipe("ntp", 1, 0))
    (study,) = find_studies(find_runs([str(tmp_path / "archive")]))
    plain, moved = study.arms
    assert (plain.name, moved.name) == ("ntp", "m")
    assert moved.differs_from(plain) == {"before model.mask_ratio": 0.15}
    assert min(moved.any_run.over_tokens("val/loss")) == 320, "the curves have both parts"


@pytest.mark.parametrize("resumed_again", [False, True])
def test_a_run_without_its_beginning_is_not_plain(tmp_path, resumed_again):
    folder = tmp_path / "rest/main"
    checkpoint = folder / "checkpoints/step=70.ckpt" if resumed_again else "runs/lost/checkpoints/step=20.ckpt"
    resumed = recipe("rest", 1, 0, ckpt_path=str(checkpoint))
    write_run(folder, resumed, first_step=60 if resumed_again else 30)
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("hp_metric", -1, 0)  # as Lightning does, resumed or not
    write_run(tmp_path / "meap", recipe("meap", 1, 0.15))
    with pytest.raises(UserError, match=r"\(before rest was resumed, its mask ratio was unknown\)"):
        find_studies(find_runs([str(tmp_path)]))
    write_run(tmp_path / "ntp", recipe("ntp", 1, 0))
    (study,) = find_studies(find_runs([str(tmp_path)]))
    assert {arm.name: arm.baseline.name for arm in study.masked} == {"meap": "ntp", "rest": "ntp"}


def test_a_plain_run_that_resumed_in_its_folder_is_a_baseline(tmp_path):
    folder = tmp_path / "ntp/main"
    config = recipe("ntp", 1, 0, ckpt_path=str(folder / "checkpoints/step=5.ckpt"))  # before it logged anything
    write_run(folder, config, summary={"first_step": 5, "seconds": 1.0})
    write_run(tmp_path / "meap", recipe("meap", 1, 0.15))
    (study,) = find_studies(find_runs([str(tmp_path)]))
    assert study.arms[0].is_plain


def test_a_run_that_logs_more_often_since_its_resume_has_its_beginning(tmp_path):
    """Its recipe has the new `trainer.log_every_n_steps` only."""
    folder = tmp_path / "ntp"
    config = recipe("ntp", 1, 0, ckpt_path=str(folder / "checkpoints/step=200.ckpt"))
    write_run(folder, config, summary={"first_step": 200, "seconds": 1.0})
    (folder / "curves.csv").unlink()
    table = MetricsTable(folder, 0)
    for step in (100, 200, 210, 220):
        table.log_metrics({"val/loss": 1.0}, step - 1)
    (run,) = find_runs([str(tmp_path)])
    assert run.has_beginning


def test_the_path_of_a_dataset_does_not_make_an_arm(tmp_path):
    for seed, folder in ((1, "data"), (2, "/mnt/b/data")):
        values = {"data__init_args__datasets": f"{folder}/text", "data__init_args__tokenizer": f"{folder}/tokenizer"}
        summary = {"first_step": 0, "seconds": 1.0, "decoder": {**DECODER, "vocab_size": 8}}
        summary["datasets"] = {f"{folder}/text": "f" * 64}
        write_run(tmp_path / f"ntp_{seed}", recipe("ntp", seed, **values), summary=summary)
    (study,) = find_studies(find_runs([str(tmp_path)]))
    assert [list(arm.runs) for arm in study.arms] == [["1", "2"]]


def write_run_on(folder, fingerprints, name, ratio, **values):
    """A run on datasets with these fingerprints, by path."""
    summary = {"first_step": 0, "seconds": 1.0, "decoder": {**DECODER, "vocab_size": 8}, "datasets": fingerprints}
    values = {"data__init_args__datasets": dict.fromkeys(fingerprints, 1.0), **values}
    write_run(folder, recipe(name, 1, ratio, **values), summary=summary)


@pytest.mark.parametrize(
    ("fingerprints", "values"),
    [
        ({"data/text": "a" * 64}, {}),
        ({"data/text": "f" * 64, "data/more": "a" * 64}, {}),
        ({"data/text": "f" * 64}, {"data__init_args__seq_len": 16}),
        ({"data/text": "f" * 64}, {"data__init_args__val_samples": 4}),
    ],
)
def test_runs_that_were_validated_on_other_data_do_not_compare(tmp_path, fingerprints, values):
    write_run_on(tmp_path / "ntp", {"data/text": "f" * 64}, "ntp", 0)
    write_run_on(tmp_path / "meap", fingerprints, "meap", 0.15, **values)
    message = r"no baseline \(.* of meap; .* \(validated on other data, so that losses do not compare: ntp; see"
    with pytest.raises(UserError, match=message):
        find_studies(find_runs([str(tmp_path)]))
    write_run_on(tmp_path / "ntp_other", fingerprints, "ntp_other", 0, **values)
    studies = find_studies(find_runs([str(tmp_path)]))
    assert [[arm.name for arm in study.arms] for study in studies] == [["ntp"], ["ntp_other", "meap"]]
    assert studies[1].title == "Pretraining, 66 parameters (2)"


def test_the_same_data_compares_wherever_it_is(tmp_path):
    write_run_on(tmp_path / "ntp", {"data/text": "f" * 64, "data/more": "a" * 64}, "ntp", 0)
    write_run_on(tmp_path / "meap", {"/mnt/b/more": "a" * 64, "/mnt/b/text": "f" * 64}, "meap", 0.15)
    (study,) = find_studies(find_runs([str(tmp_path)]))
    assert [arm.name for arm in study.arms] == ["ntp", "meap"]


def test_datasets_of_unknown_content_are_known_by_their_folder(tmp_path):
    there = {"data__init_args__datasets": str(Path.cwd() / "data/text")}
    other = {"data__init_args__datasets": "other/text"}
    write_run_on(tmp_path / "ntp", {}, "ntp", 0, data__init_args__datasets="data/text")
    for ratio, values in ((0.1, there), (0.2, other), (0, other)):
        write_run_on(tmp_path / f"p{ratio}", {}, f"p{ratio}", ratio, **values)
    studies = find_studies(find_runs([str(tmp_path)]))
    assert [[arm.name for arm in study.arms] for study in studies] == [["ntp", "p0.1"], ["p0", "p0.2"]]


def test_rows_of_another_length_do_not_change_the_loss_of_conversations(tmp_path):
    tuned = {"fine_tuning": True, "init_from": "hf/model"}
    longer = recipe("concat", 1, 0.1, data__init_args__seq_len=16, **tuned)
    (study,) = studies_of(tmp_path, recipe("plain", 1, 0, **tuned), longer)
    assert [arm.name for arm in study.masked] == ["concat"]


def test_continued_pretraining_is_plain_only_if_it_began_plain(tmp_path):
    starts = [recipe("ntp", 1, 0), recipe("meap", 1, 0.15)]
    longer = [
        recipe(f"{name}_32k", 1, ratio, init_from=str(tmp_path / f"{number:02}"))
        for number, (name, ratio) in enumerate((("ntp", 0), ("meap", 0)))
    ]
    _, study = studies_of(tmp_path, *starts, *longer)
    assert study.title.startswith("Continued pretraining")
    assert [(arm.name, arm.is_plain) for arm in study.arms] == [("ntp_32k", True), ("meap_32k", False)]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([recipe("a", 1, 0), recipe("b", 1, 0)], "have the same recipe and seed 1; leave one of them out"),
        ([recipe("a", 1, 0.15), recipe("a", 2, 0.15)], "no baseline (model.mask_ratio 0) for the pretraining of a"),
        (
            [recipe("a", 1, 0.1, fine_tuning=True, init_from="hf/model")],
            "no baseline (data.duplication.mask_ratio 0) for the fine-tuning of a; name its runs too",
        ),
    ],
)
def test_wrong_studies(tmp_path, configs, message):
    with pytest.raises(UserError) as error:
        studies_of(tmp_path, *configs)
    assert message in str(error.value)
