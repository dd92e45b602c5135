import copy
import json
import math
import random
import re
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import cv2
import helpers
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.models.realesrnet_model import RealESRNetModel
from basicsr.models.sr_model import SRModel
from basicsr.models.swinir_model import SwinIRModel
from basicsr.utils import img2tensor, tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch.nn.parallel import DistributedDataParallel
from training_runs import SWINIR, in_ranks

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline import evaluation, reports
from dlgsanet_arch.pipeline.adapter import adapt, build
from dlgsanet_arch.pipeline.evaluation import EvaluationError, Images
from dlgsanet_arch.pipeline.processes import Processes, RemoteRankError
from dlgsanet_arch.pipeline.reports import Evaluation, Row
from dlgsanet_arch.tiles import self_ensemble

IMAGES = 5


NETWORKS = {
    "DLGSANet": dict(helpers.SMALL_NETWORK),
    "EDSR": {"type": "EDSR", "num_feat": 8, "num_block": 1, "num_in_ch": 3, "num_out_ch": 3},
    "SwinIR": SWINIR,
}
NETWORKS["EDSR"]["upscale"] = 2


class ThirdParty(SRModel):
    """A model with a test of its own, and results that are not `output`."""

    def test(self):
        super().test()
        self.blended = 0.5 * self.output + 0.5 * self.output.flip(1)

    def get_current_visuals(self):
        return OrderedDict(result=self.blended.cpu(), gt=self.gt.cpu())


MODELS = {
    "SRModel of DLGSANet": (SRModel, "DLGSANet"),
    "SRModel of EDSR": (SRModel, "EDSR"),
    "SwinIRModel": (SwinIRModel, "SwinIR"),
    "a third party's": (ThirdParty, "EDSR"),
}


METRICS = {
    "psnr": {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True},
    "ssim": {"type": "calculate_ssim", "crop_border": 2, "test_y_channel": True},
    "rgb": {"type": "calculate_psnr", "crop_border": 0, "better": "higher"},
    "level": {"type": "mean_level"},
    "error": {"type": "largest_error", "better": "lower"},
}


@METRIC_REGISTRY.register()
def mean_level(img, **settings):
    return float(img.mean())


@METRIC_REGISTRY.register()
def largest_error(img, img2, **settings):
    return np.abs(img.astype(float) - img2).max()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    helpers.write_pairs(folder, IMAGES)
    return folder


def said(logged: list[str]) -> str:
    """Return the last report of a validation."""
    return [line for line in logged if line.startswith("Validation")][-1]


def complete(folder: Path, data: Path, network: str = "EDSR", *, train: bool = True) -> dict:
    opt = helpers.small_train_options(data)
    val = {"suffix": None, "pbar": False, "metrics": copy.deepcopy(METRICS), "save_img": True}
    paths = {"visualization": str(folder / "visualization"), "pretrain_network_g": None}
    opt |= {
        "is_train": train,
        "dist": False,
        "rank": 0,
        "num_gpu": 0,
        "network_g": copy.deepcopy(NETWORKS[network]),
        "val": val,
        "path": paths,
    }
    opt["datasets"]["val"] |= {"phase": "val", "scale": 2, "num_worker_per_gpu": 0}
    return opt


@pytest.fixture
def opt(tmp_path, data) -> dict:
    """Options of a training with EDSR, whose results go into tmp_path."""
    return complete(tmp_path, data)


def built(kind: type[SRModel], opt: dict) -> SRModel:
    torch.manual_seed(1)
    model = kind(copy.deepcopy(opt))
    for parameter in model.net_g.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def evaluate(model, opt, processes=Processes(), writer=None) -> Evaluation:  # noqa: B008
    adapt(model, processes)
    images = Images(opt["datasets"]["val"], processes)
    return model.validation(images, 7, writer, opt["val"]["save_img"])


def of_basicsr(model: SRModel, opt: dict) -> dict[str, float]:
    dataset_opt = opt["datasets"]["val"]
    loader = build_dataloader(build_dataset(dataset_opt), dataset_opt)
    SRModel.nondist_validation(model, loader, 7, None, True)
    return model.metric_results


@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize("kind", MODELS)
def test_figures_images_and_records_are_basicsr_s(kind, train, data, tmp_path, logged):
    model_class, network = MODELS[kind]
    made = []
    for folder, validate in ((tmp_path / "ours", evaluate), (tmp_path / "theirs", of_basicsr)):
        opt = complete(folder, data, network, train=train)
        model = built(model_class, opt)
        validate(model, opt)
        made.append((model, helpers.tree(folder), said(logged)))
    (ours, our_files, our_line), (theirs, their_files, their_line) = made
    for name, value in theirs.metric_results.items():
        close = 1e-6 if name == "ssim" else 1e-4
        assert ours.metric_results[name] == pytest.approx(value, rel=0, abs=close)
        best = theirs.best_metric_results["made_val"][name]
        assert ours.best_metric_results["made_val"][name] == {
            **best,
            "val": pytest.approx(best["val"], rel=0, abs=close),
        }
    assert list(ours.metric_results) == list(theirs.metric_results)
    assert len(our_files) == IMAGES
    assert our_files == their_files
    if not train:
        their_line = re.sub(r"\tBest: .*", "", their_line)  # of one figure
    assert re.sub(r"\tbicubic: .*", "", our_line) == their_line
    assert our_line.startswith("Validation made_val\n\t # psnr: ")


def test_workers_read_what_this_process_reads(opt):
    alone = evaluate(built(SRModel, opt), opt)
    opt["datasets"]["val"]["num_worker_per_gpu"] = 2
    assert evaluate(built(SRModel, opt), opt) == alone
    assert (alone.dataset, alone.iteration, alone.identical) == ("made_val", 7, 0)
    assert [row.name for row in alone.rows] == [f"image{i}" for i in range(IMAGES)]
    for name, mean in alone.means.items():
        assert mean == pytest.approx(np.mean([row.values[name] for row in alone.rows]), rel=1e-12)


@pytest.mark.parametrize(
    ("model_class", "network"), [(SRModel, "DLGSANet"), (SwinIRModel, "SwinIR")]
)
def test_ensemble_and_tiles_go_through_the_model_s_own_test(model_class, network, data, tmp_path):
    opt = complete(tmp_path, data, network)
    seen = []

    class Watched(model_class):
        def test(self):
            seen.append(tuple(self.lq.shape[2:]))
            super().test()

    plain = evaluate(built(Watched, opt), opt)
    assert seen == [(24, 32)] * IMAGES
    opt["val"]["self_ensemble"] = True
    seen.clear()
    model = built(Watched, opt)
    ensemble = evaluate(model, opt)
    assert len(seen) == 8 * IMAGES
    assert seen.count((32, 24)) == 4 * IMAGES
    assert ensemble.means != plain.means
    saved = cv2.imread(str(tmp_path / "visualization/image2/image2_7.png"))
    model.lq = img2tensor(cv2.imread(str(data / "LR/image2.png")).astype(np.float32) / 255)[None]

    def run(image):
        model.lq = image
        model.test()
        return model.output

    assert np.array_equal(saved, tensor2img([self_ensemble(run, model.lq)]))
    opt["val"] |= {"self_ensemble": False, "tile": 16, "tile_overlap": 8}
    seen.clear()
    tiled = evaluate(built(Watched, opt), opt)
    assert seen == [(16, 16)] * 6 * IMAGES
    assert 0 < abs(tiled.means["psnr"] - plain.means["psnr"]) < 2


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_find_together_what_one_finds_alone(world, data, tmp_path, monkeypatch):
    opt = complete(tmp_path / "one", data)
    alone = evaluate(built(SRModel, opt), opt)
    whole = helpers.tree(tmp_path / "one")

    def as_another_disk_lists_it(dataset_opt):
        dataset = build_dataset(dataset_opt)
        random.shuffle(dataset.paths)
        return dataset

    monkeypatch.setattr(evaluation, "build_dataset", as_another_disk_lists_it)
    opt = complete(tmp_path / "many", data)
    models = [built(SRModel, opt) for _ in range(world)]
    found = in_ranks(world, lambda each: evaluate(models[each.rank], opt, each))
    assert found == [alone] * world  # to the bit
    assert helpers.tree(tmp_path / "many") == whole
    bests = [model.best_metric_results for model in models]
    assert bests == [bests[0]] * world


def test_a_rank_that_fails_stops_the_others_with_its_reason(data, tmp_path):
    broken = tmp_path / "broken"
    helpers.write_pairs(broken, IMAGES)
    (broken / "LR/image1.png").write_bytes(b"no image")
    opt = complete(tmp_path, broken)
    models = [built(SRModel, opt) for _ in range(3)]
    found = in_ranks(3, lambda each: evaluate(models[each.rank], opt, each))
    assert [type(error) for error in found] == [RemoteRankError, EvaluationError, RemoteRankError]
    assert all("LR/image1.png of the data set made_val" in str(error) for error in found)


class Painter(SRModel):
    """Gives the ground truth, or what is not a number, for the images that it is told."""

    perfect, broken = (), ()

    def feed_data(self, data):
        super().feed_data(data)
        self.name = Path(data["lq_path"][0]).stem

    def test(self):
        super().test()
        if self.name in self.perfect:
            self.output = self.gt + 1e-4
        if self.name in self.broken:
            self.output[0, 0, 3, 3] = self.broken[self.name]


def test_identical_images_are_counted_and_left_out_of_the_mean(opt, logged):
    plain = evaluate(built(SRModel, opt), opt)
    model = built(Painter, opt)
    model.perfect = ("image1", "image4")
    found = evaluate(model, opt)
    psnr = [row.values["psnr"] for row in found.rows]
    assert [value == math.inf for value in psnr] == [False, True, False, False, True]
    rest = [plain.rows[i].values for i in (0, 2, 3)]
    assert found.means["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rest]))
    expected = (sum(row["ssim"] for row in rest) + 2) / IMAGES
    assert found.means["ssim"] == pytest.approx(expected)
    assert found.identical == 2
    lines = said(logged).splitlines()
    assert lines[1].endswith("\tidentical (inf, not in the mean): 2 of 5")
    assert "identical" not in lines[2]
    model = built(Painter, opt)
    model.perfect = [f"image{i}" for i in range(IMAGES)]
    found = evaluate(model, opt)
    assert (found.means["psnr"], found.identical) == (math.inf, IMAGES)
    assert model.best_metric_results["made_val"]["psnr"]["val"] == math.inf
    assert "# psnr: inf\tBest: inf @ 7 iter\t" in said(logged)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_an_output_that_is_not_finite_is_named(opt, value, logged):
    model = built(Painter, opt)
    model.broken = {"image3": value}
    found = evaluate(model, opt)
    assert all(math.isnan(figure) for figure in found.rows[3].values.values())
    assert all(math.isfinite(figure) for figure in found.rows[2].values.values())
    assert all(math.isnan(mean) for mean in found.means.values())
    assert any("image3 of the data set made_val is not finite" in line for line in logged)
    assert model.best_metric_results["made_val"]["psnr"]["iter"] == -1


def test_the_best_is_the_best_of_all_validations(opt, logged):
    model = built(Painter, opt)
    loader = Images(opt["datasets"]["val"], Processes())
    adapt(model, Processes())
    first = model.validation(loader, 5, None)
    model.perfect = ("image0", "image1")
    del model.best_metric_results["made_val"]["ssim"]  # as resumed from a run without it
    second = model.validation(loader, 10, None)
    model.perfect = ()
    model.validation(loader, 15, None)
    bests = model.best_metric_results["made_val"]
    assert bests["error"] == {"better": "lower", "val": second.means["error"], "iter": 10}
    assert bests["ssim"] == {"better": "higher", "val": second.means["ssim"], "iter": 10}
    assert first.means["error"] > second.means["error"]
    assert f"# error: {first.means['error']:.4f}\tBest: {bests['error']['val']:.4f} @ 10 iter" in (
        said(logged)
    )


def test_a_set_without_ground_truth(opt, tmp_path, logged):
    opt["datasets"]["val"]["type"] = "SingleImageDataset"
    model = built(SRModel, opt)
    model.gt = torch.zeros(1, 3, 48, 64)  # of the training's last batch
    found = evaluate(model, opt)
    pictures = [cv2.imread(str(path)) for path in sorted(tmp_path.rglob("*_7.png"))]
    assert found.means == {"level": pytest.approx(np.mean([each.mean() for each in pictures]))}
    assert all(set(row.values) == {"level"} for row in found.rows)
    warnings = [line for line in logged if "no ground truth" in line]
    assert len(warnings) == 1
    assert "psnr, ssim, rgb, error of val:metrics" in warnings[0]


class Careless(SRModel):
    """Draws random numbers, changes modes, notes what it is, and may fail."""

    failing = False

    def test(self):
        self.seen = type(self.net_g), self.is_train, torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1)
        self.net_g.train()
        self.net_g_ema.train()
        super().test()
        if self.failing:
            raise RuntimeError("no luck")


class RealLike(Careless):
    """Takes LR as it is in validations, though it makes its own in training; CUDA's would."""

    nondist_validation = RealESRNetModel.nondist_validation


@pytest.mark.parametrize("kind", [Careless, RealLike])
@pytest.mark.parametrize("failing", [False, True])
def test_nothing_is_disturbed(opt, kind, failing, group):
    model = built(kind, opt)
    model.failing = failing
    model.net_g = wrapped = DistributedDataParallel(model.net_g)
    first = next(wrapped.module.children()).eval()  # as a frozen layer
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(RuntimeError, match="no luck") if failing else nullcontext():
        evaluate(model, opt)
    assert model.seen == (type(wrapped.module), kind is Careless, False)
    assert (model.net_g, model.is_train) == (wrapped, True)
    modes = [each.training for each in (wrapped, wrapped.module, first)]
    assert modes == [True, True, False]
    assert not any(module.training for module in model.net_g_ema.modules())
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().tolist() == states[2]


class OwnWay(SRModel):
    """Validates by its own method, which uses the loader as BasicSR's does."""

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        self.calls = dataloader.dataset.opt["name"], len(dataloader), current_iter, save_img
        self.read = [batch["lq_path"][0] for batch in dataloader]
        assert not isinstance(self.net_g, DistributedDataParallel)
        torch.rand(1)
        self.metric_results = {"psnr": np.float64(12.5)}


def test_a_validation_of_a_class_s_own_is_left_alone(opt, logged):
    opt["dist"], models = False, [built(OwnWay, opt) for _ in range(2)]

    def run(processes):
        model = models[processes.rank]
        model.opt |= {"dist": True, "rank": processes.rank}
        return evaluate(model, opt, processes)

    assert in_ranks(2, run) == [Evaluation("made_val", 7, (), {"psnr": 12.5})] * 2
    assert models[0].calls == ("made_val", IMAGES, 7, True)
    assert [Path(path).stem for path in models[0].read] == [f"image{i}" for i in range(IMAGES)]
    assert not hasattr(models[1], "read")
    assert any("OwnWay has a method nondist_validation of its own" in line for line in logged)


class WithoutInput(SRModel):
    def feed_data(self, data):
        self.given = data["lq"]


FAULTS = {
    "border": (
        lambda opt: opt["val"]["metrics"]["psnr"].update(crop_border=24),
        r"metrics:psnr: image0 of the data set made_val of 64x48",
    ),
    "metric": (
        lambda opt: opt["val"]["metrics"].update(n={"type": "calculate_niqe", "crop_border": 0}),
        r"metrics:n: image0 of .* made_val of 64x48",
    ),
    "tiles": (lambda opt: opt["val"].update(tile=16), "WithoutInput has no `lq`"),
    "folder": (
        lambda opt: Path(opt["path"]["visualization"]).write_text("a file"),
        r"image0_7\.png cannot be written",
    ),
    "empty": (
        lambda opt: opt["datasets"]["val"].update(type="SingleImageDataset", dataroot_lq="."),
        "made_val has no image",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_metric_that_raises_anything_is_named_with_its_image(opt, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    change, message = FAULTS[fault]
    change(opt)
    with pytest.raises(UserError, match=message):
        evaluate(built(WithoutInput if fault == "tiles" else SRModel, opt), opt)


def test_the_first_validation_has_bicubic_beside_it_and_a_note_on_young_averages(opt, logged):
    model = built(SRModel, opt)
    found = evaluate(model, opt)
    assert found.bicubic.keys() == {"psnr", "ssim", "rgb"}
    assert f"bicubic: {found.bicubic['psnr']:.4f}" in said(logged)
    assert 15 < found.bicubic["psnr"] < 60
    assert "99% are still the random weights of the start" in logged[-1]
    images_again = Images(opt["datasets"]["val"], Processes())
    again = model.validation(images_again, 8, None)
    assert (again.bicubic, again.means) == ({}, found.means)
    assert "bicubic" not in said(logged)


@pytest.mark.parametrize("start", [None, "weights.pth"])
def test_the_note_on_young_averages_is_for_random_starts_alone(opt, logged, start):
    opt["path"]["pretrain_network_g"] = start
    images = Images(opt["datasets"]["val"], Processes())
    build(opt, Processes()).validation(images, 7, None)
    assert any("random weights of the start" in line for line in logged) == (start is None)


def test_tensorboard_shows_figures_and_the_first_images(opt, tmp_path, monkeypatch):
    writer, models = Mock(), [built(SRModel, opt) for _ in range(3)]
    found = in_ranks(
        3,
        lambda each: evaluate(models[each.rank], opt, each, writer if each.is_main else None),
    )[0]
    scalars = [call.args for call in writer.add_scalar.call_args_list]
    assert scalars == [(f"metrics/made_val/{k}", v, 7) for k, v in found.means.items()]
    images = [call.args for call in writer.add_image.call_args_list]
    assert [tag for tag, *_ in images] == [f"validation/made_val/image{i}" for i in range(4)]
    for tag, image, _ in images:
        name = Path(tag).name
        saved = cv2.imread(str(tmp_path / f"visualization/{name}/{name}_7.png"))
        assert np.array_equal(image, saved[..., ::-1].transpose(2, 0, 1))
    monkeypatch.setattr(evaluation, "_SHOWN_SIDE", 20)
    evaluate(built(SRModel, opt), opt, writer=writer)
    part = writer.add_image.call_args.args[1]
    assert np.array_equal(part, image[:, 14:34, 22:42])
    writer.add_image.reset_mock()
    opt["is_train"] = False
    evaluate(built(SRModel, opt), opt, writer=writer)
    writer.add_image.assert_not_called()


def test_reports_hold_every_figure(tmp_path):
    values = {"a": {"psnr": 30.12345678901234, "ssim": 0.9}, "b": {"psnr": math.inf, "ssim": 1.0}}
    rows = tuple(Row(name, figures) for name, figures in values.items())
    means = {"psnr": 30.12345678901234, "ssim": math.nan}
    reports.write([Evaluation("Set5", "run", rows, means, 1)], tmp_path / "results")
    written = helpers.tree(tmp_path)
    assert list(written) == ["results/Set5.csv", "results/evaluation.json"]
    table = b"image,psnr,ssim\na,30.12345678901234,0.9\nb,inf,1.0\n"
    assert written["results/Set5.csv"] == table
    content = json.loads(written["results/evaluation.json"], parse_constant=pytest.fail)
    assert content["Set5"] == {
        "iteration": "run",
        "means": {"psnr": 30.12345678901234, "ssim": "nan"},
        "identical": 1,
        "images": [{"image": "a", **values["a"]}, {"image": "b", "psnr": "inf", "ssim": 1.0}],
    }
    with pytest.raises(UserError, match=r"reports in .*Set5\.csv cannot be written"):
        reports.write([], tmp_path / "results/Set5.csv")
