"""Evaluation: equal to a plain training loop, repeatable network by network, resumable from its record."""

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import atom_fast as af
from atom_fast.data.augmentation import augment, draw_augmentation
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing, fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.evaluation import accuracy as evaluation
from atom_fast.evaluation.accuracy import architecture_of, evaluate
from atom_fast.evaluation.sets import random_sets, select
from atom_fast.networks import NETWORKS, ConvNet, make_network
from atom_fast.synthetic import SyntheticSet
from atom_fast.training import get_protocol
from atom_fast.training import trainer as training
from atom_fast.training.ensemble import _Ensemble, train_networks
from atom_fast.training.trainer import Trainer, accuracy, network_seed
from tests.evaluation.interruptions import count_trained, interrupted_after

SMALL = {"width": 8, "depth": 2}


def stripes(train=60, test=90, classes=3, size=8):
    """Classes that differ in where a bright bar lies, under noise."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.randint(classes, (count,), generator=generator)
        labels[:classes] = torch.arange(classes)
        images = torch.randint(0, 120, (count, 2, size, size), generator=generator)
        bar = torch.arange(size) // (size // classes) == labels[:, None]
        return (images + 130 * bar[:, None, :, None]).to(torch.uint8), labels

    names = [f"class {k}" for k in range(classes)]
    return ImageData.from_tensors("stripes", names, *split(train), *split(test))


@pytest.fixture(scope="module")
def data(device):
    return stripes().to(device)


@pytest.fixture(scope="module")
def preprocessing(data):
    return fit_preprocessing(data.train_images, "standard", progress=False)


def as_set(data, preprocessing, indices=slice(None)):
    """Training images as a set."""
    images, labels = preprocessing.to_model(data.train_images[indices]), data.train_labels[indices]
    return SyntheticSet(images, labels, data.class_names, preprocessing, {"dataset": data.name})


@pytest.fixture(scope="module")
def small_set(data, preprocessing):
    """23 images in model space: two batches of 10 and one of 3."""
    return as_set(data, preprocessing, slice(23))


# Learning rates that float32 holds exactly, so that float64 networks can be compared closely.
PROTOCOL = get_protocol("paper", epochs=6, batch_size=10, learning_rate=1 / 16, decay_every=2, decay_factor=0.5)


@af.backend("reference")
def plain_loop(images, labels, protocol, seed, network):
    """One network trained as anyone would write it, unfused, from the same draws."""
    generator = torch.Generator(images.device).manual_seed(seed)
    network.reset_parameters(generator)
    network.train()
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    for epoch in range(protocol.epochs):
        order = torch.randperm(len(images), generator=generator, device=images.device)
        for start in range(0, len(images), protocol.batch_size):
            index = order[start : start + protocol.batch_size]
            batch = images[index]
            if protocol.augmentation != "none":
                parameters = draw_augmentation(
                    len(index),
                    generator,
                    strategy=protocol.augmentation,
                    shared_operation=True,
                    device=images.device,
                )
                batch = augment(batch, parameters, torch.arange(len(index), device=images.device))
            loss = F.cross_entropy(network(batch), labels[index])
            # A bias that InstanceNorm cancels has no gradient.
            gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
            with torch.no_grad():
                for p, v, g in zip(network.parameters(), velocity, gradients, strict=True):
                    if g is None:
                        continue
                    v.mul_(protocol.momentum).add_(g + protocol.weight_decay * p)
                    p.sub_(protocol.learning_rate_at(epoch) * v)
    return network


def train(trainer, seed):
    trainer.restart(seed)
    for epoch in range(trainer.protocol.epochs):
        trainer.train_epoch(epoch)
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


def assert_same_network(got, network, tolerance=1e-9):
    """The same weights, except biases that InstanceNorm subtracts: a plain loop lets them decay."""
    instance = {f"{name}.convolution.bias" for name, m in network.named_modules() if _has_instance_norm(m)}
    for name, tensor in network.state_dict().items():
        if name not in instance:
            torch.testing.assert_close(
                got[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text
            )


def _has_instance_norm(module):
    norm = getattr(module, "norm", None)
    return isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels


@pytest.mark.parametrize("own_sets", [False, True])
def test_whitened_images_are_trained_and_tested_on_at_unit_variance(own_sets, data, device):
    pytest.importorskip("kornia", reason="ZCA is fitted by kornia")
    whitening = fit_preprocessing(data.train_images, "zca", progress=False)
    protocol = dataclasses.replace(PROTOCOL, augmentation="color")
    options = {"networks": 2, "architecture": {**SMALL, "norm": "batch"}, "progress": False, "device": device}
    whitened = as_set(data, whitening, slice(23))

    def tested(synthetic, **changes):
        given = (lambda index: synthetic) if own_sets else synthetic
        return evaluate(given, data, protocol=dataclasses.replace(protocol, **changes), **options).curves

    class Divided(Preprocessing):
        def to(self, device):
            return self

        def to_model(self, pixels):
            return super().to_model(pixels) * (1 / whitening.deviation)

    divided = as_set(data, Divided(**whitening.tensors()), slice(23))
    got = tested(whitened)
    assert whitening.deviation < 0.9
    assert got == tested(divided, unit_variance=False)
    assert got != tested(whitened, unit_variance=False)


@pytest.mark.parametrize(
    "norm, augmentation",
    [("instance", "color_crop_cutout_flip_scale_rotate"), ("batch", "none"), ("group", "flip_scale")],
)
def test_training_equals_a_plain_loop(augmentation, norm, small_set, device):
    images, labels = small_set.images.double(), small_set.labels
    protocol = dataclasses.replace(PROTOCOL, epochs=7, augmentation=augmentation)

    def network():
        return ConvNet(2, 3, 8, norm=norm, **SMALL).to(device, torch.float64)

    expected = plain_loop(images, labels, protocol, 4, network())  # 21 steps
    channels_last = images.contiguous(memory_format=torch.channels_last)
    trainer = Trainer(network().to(memory_format=torch.channels_last), channels_last, labels, protocol)
    assert_same_network(train(trainer, 4), expected)


def test_batches_keep_the_layout_of_the_set(device):
    seen = []
    images = torch.randn(6, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(6, device=device) % 2
    network = ConvNet(3, 2, 8, **SMALL).to(device)
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    Trainer(network, images, labels, PROTOCOL).step(torch.tensor([4, 1, 2], device=device))
    assert [batch.is_contiguous(memory_format=torch.channels_last) for batch in seen] == [True]


@pytest.mark.parametrize("name, size", [("alexnet", 8), ("resnet18", 16), ("vit", 8)])
def test_training_of_other_networks_equals_a_plain_loop(name, size, device):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64).to(device)
    labels = torch.tensor([0, 1, 1], device=device)
    protocol = dataclasses.replace(PROTOCOL, epochs=2, batch_size=2, learning_rate=1 / 64)

    def network():
        return make_network(name, 3, 2, size).to(device, torch.float64)

    expected = plain_loop(images, labels, protocol, 4, network())  # 4 steps
    channels_last = images.contiguous(memory_format=torch.channels_last)
    trainer = Trainer(network().to(memory_format=torch.channels_last), channels_last, labels, protocol)
    got = train(trainer, 4)
    expected.eval()
    trainer.network.eval()
    with torch.no_grad():  # not the weights: a bias before InstanceNorm may be anything
        torch.testing.assert_close(trainer.network(images), expected(images), rtol=1e-7, atol=1e-9)
    assert not any(tensor.isnan().any() for tensor in got.values())


def test_evaluation_is_training_and_testing(small_set, data, preprocessing, device):
    """The public function adds the seeds and the test, and nothing else, to the loop above."""
    result = evaluate(
        small_set, data, protocol=PROTOCOL, networks=2, seed=9, architecture=SMALL, device=device, progress=False
    )
    for index, got in enumerate(result.accuracies):
        network = ConvNet(2, 3, 8, **SMALL).to(device)
        plain_loop(small_set.images, small_set.labels, PROTOCOL, network_seed(9, index), network)
        with torch.no_grad():
            correct = (network(preprocessing.to_model(data.test_images)).argmax(1) == data.test_labels).sum().item()
        assert got == pytest.approx(100 * correct / len(data.test_images), abs=100 / len(data.test_images))


@pytest.fixture(scope="module")
def double_trainer(small_set, device):
    """Makes trainers in float64."""
    images = small_set.images.double().contiguous(memory_format=torch.channels_last)

    def make():
        network = ConvNet(2, 3, 8, norm="batch", **SMALL).to(device, torch.float64)
        return Trainer(network.to(memory_format=torch.channels_last), images, small_set.labels, PROTOCOL)

    return make


def trained_together(make_trainer, jobs, together):
    """The weights of each network at its end."""
    numbers, found = {}, {}

    def start(trainer, job):
        numbers[id(trainer)] = job
        trainer.restart(network_seed(0, job))

    def test(trainer):
        state = trainer.network.state_dict()
        found[numbers[id(trainer)]] = {name: tensor.clone() for name, tensor in state.items()}
        return 1.0

    options = {"evaluate_every": None, "together": together, "advance": lambda: None}
    curves = dict(train_networks(make_trainer, jobs, start, test, **options))
    assert curves == {job: {PROTOCOL.epochs: 1.0} for job in jobs}
    return found


def test_a_network_is_the_same_alone_or_among_others(double_trainer):
    threads = torch.get_num_threads()
    among = trained_together(double_trainer, range(5), 3)
    assert torch.get_num_threads() == threads
    for job in (4, 0):
        (alone,) = trained_together(double_trainer, [job], None).values()
        by_itself = train(double_trainer(), network_seed(0, job))
        for name, tensor in among[job].items():
            torch.testing.assert_close(alone[name], tensor, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(by_itself[name], tensor, rtol=1e-9, atol=1e-9)
    assert not torch.equal(among[0]["classifier.weight"], among[1]["classifier.weight"])


def test_every_stream_is_joined_where_memory_runs_out(monkeypatch):
    """A capture that ends with a stream apart raises an error of its own, and would hide that memory ran out."""

    class Stream:
        def __init__(self):
            self.waited_for = []

        def wait_stream(self, other):
            self.waited_for.append(other)

    def run_out(indices):
        raise torch.OutOfMemoryError("out of memory")

    current, ensemble = Stream(), object.__new__(_Ensemble)
    ensemble._device, ensemble._streams = None, [Stream(), Stream(), Stream()]
    ensemble.trainers = [SimpleNamespace(step=step) for step in (lambda indices: None, run_out, run_out)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with pytest.raises(torch.OutOfMemoryError):
        ensemble._steps(torch.zeros(3, 1))
    assert current.waited_for == ensemble._streams
    assert all(stream.waited_for == [current] for stream in ensemble._streams)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_in_graphs_as_it_does_step_by_step(name, precision):
    data = stripes(classes=2, size=32).to("cuda")
    space = fit_preprocessing(data.train_images, "standard", progress=False)
    synthetic = as_set(data, space)
    images, labels = synthetic.images, synthetic.labels
    protocol = dataclasses.replace(PROTOCOL, epochs=2, batch_size=25, learning_rate=1 / 256)
    settings = {"protocol": protocol, "network": name, "precision": precision, "progress": False}
    result = evaluate(synthetic, data, networks=5, together=2, architecture={}, **settings)
    network = make_network(name, 2, 2, 32).to("cuda", memory_format=torch.channels_last)
    layout = {"memory_format": torch.channels_last}
    trainer = Trainer(network, images.contiguous(**layout), labels, protocol, precision=precision)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=True):
        for index in (0, 4):
            train(trainer, network_seed(0, index))
            alone = accuracy(network, space.to_model(data.test_images).contiguous(**layout), data.test_labels)
            assert result.accuracies[index] == pytest.approx(alone, abs=3)


def test_a_failure_in_one_network_ends_the_others(double_trainer):
    def start(trainer, job):
        trainer.restart(job)
        if job == 2:
            raise ValueError("no set for network 2")

    options = {"evaluate_every": None, "together": 2, "advance": lambda: None}
    with pytest.raises(ValueError, match="no set for network 2"):
        list(train_networks(double_trainer, range(4), start, lambda trainer: 1.0, **options))


def test_results_are_repeatable_and_depend_on_the_seed(small_set, data, preprocessing):
    def curves(seed, networks):
        settings = {"protocol": PROTOCOL, "architecture": SMALL, "evaluate_every": 1, "progress": False}
        return evaluate(small_set, data, networks=networks, seed=seed, **settings).curves

    three = curves(1, 3)
    assert curves(1, 3) == three
    assert curves(1, 2) == three[:2]
    assert len({tuple(curve.values()) for curve in three}) == 3
    assert curves(2, 3) != three


def test_the_default_generator_and_the_inputs_are_left_alone(small_set, data, preprocessing):
    images, labels = small_set.images.clone(), small_set.labels.clone()
    state = torch.get_rng_state()
    evaluate(small_set, data, protocol=PROTOCOL, networks=1, architecture=SMALL, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(small_set.images, images) and torch.equal(small_set.labels, labels)


def test_momentum_is_forgotten_between_networks_and_may_be_zero(small_set, device):
    for momentum in (0.0, 0.9):
        protocol = dataclasses.replace(PROTOCOL, momentum=momentum)
        trainer = Trainer(ConvNet(2, 3, 8, **SMALL).to(device), small_set.images, small_set.labels, protocol)
        first, again = train(trainer, 0), train(trainer, 0)
        for name, tensor in first.items():
            torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-6)


def test_network_seeds_differ():
    seeds = {network_seed(seed, index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
    assert len({seed % 2**32 for seed in seeds}) == 400  # the CPU's generator takes 32 bits of a seed


class Recorder(nn.Module):
    """Remembers the images it is trained on, each of which holds its own number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches = []

    def reset_parameters(self, generator):
        pass

    def forward(self, x):
        self.batches.append(x[:, 0, 0, 0].long().tolist())
        return torch.stack([x[:, 0, 0, 0] * self.weight] * 2, 1)


@pytest.mark.parametrize("batch, sizes", [(10, [10, 10, 3]), (23, [23]), (256, [23]), (1, [1] * 23)])
def test_an_epoch_shows_every_image_once_in_random_order(batch, sizes):
    numbered = torch.arange(23.0)[:, None, None, None].expand(23, 1, 2, 2).contiguous()
    recorder = Recorder()
    protocol = get_protocol("paper", batch_size=batch, augmentation="none")
    trainer = Trainer(recorder, numbered, torch.zeros(23, dtype=torch.int64), protocol)
    trainer.restart(0)
    orders = []
    for epoch in range(3):
        recorder.batches.clear()
        trainer.train_epoch(epoch)
        assert [len(seen) for seen in recorder.batches] == sizes
        orders.append([number for seen in recorder.batches for number in seen])
        assert sorted(orders[-1]) == list(range(23))
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(23))


def test_the_whole_test_set_is_counted_once(data, preprocessing, device, monkeypatch):
    network = ConvNet(2, 3, 8, **SMALL).to(device)
    with torch.no_grad():
        images = preprocessing.to_model(data.test_images)
        correct = (network(images).argmax(1) == data.test_labels).sum().item()
    monkeypatch.setitem(training.TEST_PIXELS, device.type, 7 * 64)  # 90 test images in batches of 7
    assert accuracy(network, images, data.test_labels) == pytest.approx(100 * correct / 90)


def test_networks_are_tested_in_evaluation_mode(data, preprocessing, device):
    network = ConvNet(2, 3, 8, norm="batch", **SMALL).to(device)
    with torch.no_grad():
        network.blocks[0].norm.running_mean.fill_(0.3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    accuracy(network, preprocessing.to_model(data.test_images), data.test_labels)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_best_accuracy_is_told_only_when_asked_for(small_set, data, preprocessing):
    settings = {"protocol": PROTOCOL, "networks": 2, "architecture": SMALL, "progress": False}
    last = evaluate(small_set, data, **settings)
    assert last.best_accuracies is None
    assert [list(curve) for curve in last.curves] == [[6], [6]]
    every = evaluate(small_set, data, evaluate_every=4, **settings)
    assert [list(curve) for curve in every.curves] == [[4, 6], [4, 6]]
    assert every.accuracies == last.accuracies == tuple(curve[6] for curve in every.curves)
    assert every.best_accuracies == tuple(max(curve.values()) for curve in every.curves)


def test_a_diverged_network_is_reported_and_the_others_finish(small_set, data, preprocessing, monkeypatch):
    settings = {"protocol": PROTOCOL, "networks": 3, "architecture": SMALL, "progress": False}
    expected = evaluate(small_set, data, **settings)
    restart = Trainer.restart

    def poisoned(trainer, seed):
        restart(trainer, seed)
        if seed == network_seed(0, 1):
            with torch.no_grad():
                trainer.network.classifier.bias.fill_(torch.nan)

    monkeypatch.setattr(Trainer, "restart", poisoned)
    result = evaluate(small_set, data, **settings)
    assert result.diverged == (1,)
    assert result.accuracies == (expected.accuracies[0], None, expected.accuracies[2])
    assert result.mean == pytest.approx((expected.accuracies[0] + expected.accuracies[2]) / 2)
    assert str(result).endswith("diverged: 1")
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["diverged"] == [1] and written["accuracies"][1] is None


def test_no_result_is_invented_where_all_networks_diverge(small_set, data, preprocessing):
    protocol = dataclasses.replace(PROTOCOL, learning_rate=1e30)
    result = evaluate(
        small_set,
        data,
        protocol=protocol,
        networks=2,
        evaluate_every=5,
        architecture={**SMALL, "norm": "none"},
        progress=False,
    )
    assert result.diverged == (0, 1)
    assert math.isnan(result.mean) and math.isnan(result.std)
    assert result.best_accuracies == (None, None)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["accuracy_mean"] is None


def test_an_equal_call_goes_on_from_the_record(small_set, data, tmp_path, monkeypatch):
    settings = {"protocol": PROTOCOL, "architecture": SMALL, "evaluate_every": 3, "progress": False, "together": 1}
    expected = evaluate(small_set, data, networks=4, **settings)
    settings["record"] = tmp_path / "new" / "record.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(2, patch)
        evaluate(small_set, data, networks=4, **settings)
    (kept,) = json.loads(settings["record"].read_text())
    assert kept["unfinished"] == [2, 3] and kept["dataset"] == "stripes"

    trained = count_trained(monkeypatch)
    result = evaluate(small_set, data, networks=4, **settings)
    assert trained == [network_seed(0, 2), network_seed(0, 3)]
    assert result.curves == expected.curves and result.seconds > kept["seconds"]
    # Fewer networks need no training and lose nothing; more train only what is missing.
    assert evaluate(small_set, data, networks=3, **settings).curves == expected.curves[:3]
    assert evaluate(small_set, data, networks=5, **settings).curves[:4] == expected.curves
    assert trained[2:] == [network_seed(0, 4)]


def test_other_evaluations_in_a_record_are_left_alone(small_set, data, preprocessing, tmp_path):
    path = tmp_path / "record.json"
    settings = {"protocol": PROTOCOL, "architecture": SMALL, "networks": 1, "progress": False, "record": path}
    for changes in ({}, {"seed": 1}, {"evaluate_every": 2}, {"architecture": {**SMALL, "norm": "batch"}}):
        evaluate(small_set, data, **{**settings, **changes})
    first = json.loads(path.read_text())
    assert len({record["hash"] for record in first}) == 4
    evaluate(as_set(data, preprocessing, slice(1, 24)), data, **settings)
    assert json.loads(path.read_text())[:4] == first and len(json.loads(path.read_text())) == 5


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"evaluation": {}, "state": {"complete": true, "hash": "a"}}', "[{}]"]
)
def test_a_file_that_is_no_record_is_refused(content, small_set, data, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="result.json is not a record of evaluations by this version .*; move it"):
        evaluate(small_set, data, networks=1, record=path, progress=False)
    assert path.read_text() == content


def test_random_has_its_own_selection_for_every_network(data, preprocessing, small_set):
    chosen = select(data, "random", 3, preprocessing=preprocessing)
    settings = {"protocol": PROTOCOL, "architecture": SMALL, "evaluate_every": 1, "progress": False}
    random = random_sets(data, chosen, seed=4)
    own = evaluate(random, data, networks=3, **settings)
    for index in (0, 2):
        shared = evaluate(random(index), data, networks=3, **settings)
        assert own.curves[index] == shared.curves[index]
    assert own.about["method"] == "random" and own.about["ipc"] == 3
    with pytest.raises(ValueError, match="sets must be of one size; got one of 2 images beside 9"):
        uneven = [random(0), as_set(data, preprocessing, slice(2))]
        evaluate(uneven.__getitem__, data, networks=2, **settings)
    neighbours = random_sets(data, chosen, seed=5)
    images = {tuple(sets(index).images.flatten().tolist()) for sets in (random, neighbours) for index in range(5)}
    assert len(images) == 10


def test_a_partitioned_set_is_tested_by_the_images_on_its_sheets(data, tmp_path):
    """As a set that holds these images one by one, but never taken for one."""
    sheets = select(data, "random", 2, partition=2, progress=False)
    plain = SyntheticSet(sheets.images, sheets.labels, sheets.class_names, sheets.preprocessing)
    settings = {"protocol": PROTOCOL, "networks": 1, "architecture": SMALL, "progress": False}
    settings["record"] = tmp_path / "record.json"
    tested, alike = evaluate(sheets, data, **settings), evaluate(plain, data, **settings)
    assert tested.curves == alike.curves
    assert (tested.about["ipc"], tested.about["partition"]) == (2, 2)
    assert (alike.about["ipc"], alike.about["partition"]) == (8, 1)
    assert str(tested).startswith("stripes ipc=2 partition=2 (8 images per class) random: ")
    records = json.loads(settings["record"].read_text())
    assert [(record["ipc"], record["partition"]) for record in records] == [(2, 2), (8, 1)]
    beside = evaluate(random_sets(data, sheets), data, **settings)
    assert (beside.about["ipc"], beside.about["partition"], beside.about["method"]) == (2, 2, "random")


def test_networks_of_a_partitioned_set_depend_on_its_stored_images():
    """As those of a distillation with as many images per class."""
    data = dataclasses.replace(stripes(), name="cifar10")
    for ipc, norm in ((1, "instance"), (2, "batch")):
        sheets = select(data, "random", ipc, partition=2, preprocessing="standard", progress=False)
        assert architecture_of(sheets, "cifar10")["norm"] == norm


def test_random_that_cannot_be_drawn_is_refused(data, preprocessing, small_set):
    with pytest.raises(ValueError, match="Random needs a set with as many images in every class; .*--no-random"):
        random_sets(data, small_set)
    smallest = min(data.class_sizes)
    many = as_set(data, preprocessing, data.class_index[: 3 * smallest + 3])
    many.labels = torch.arange(3 * smallest + 3) % 3
    with pytest.raises(ValueError, match=rf"Random needs {smallest + 1} images of every class, but .*--no-random"):
        random_sets(data, many)


def test_three_lines_distil_and_evaluate(tmp_path, monkeypatch):
    monkeypatch.setitem(evaluation.get_protocol.__globals__["PROTOCOLS"], "digits", get_protocol("digits", epochs=2))
    config = preset("paper", ipc=1, iterations=2, real_batch=8, width=8, depth=2)
    made = af.distill(af.load_data("digits"), config, tmp_path / "run", progress=False)
    result = af.evaluate(made, networks=2, progress=False)
    assert str(result).startswith("digits ipc=1 atom: ") and str(result).endswith("% (2 convnet networks, last epoch)")
    assert result.protocol.epochs == 2 and result.about["same_data"]
    assert result.architecture == architecture_of(made, "digits")
    assert {"width": 8, "depth": 2, "norm": "instance"}.items() <= result.architecture.items()


def test_data_that_need_a_folder_are_asked_for(data, small_set):
    with pytest.raises(ValueError, match=r"the set was made from 'stripes': pass data=load_data\('stripes', FOLDER\)"):
        evaluate(small_set)


def test_bfloat16_trains_nearly_as_well_and_keeps_float32_weights(data, preprocessing, device):
    protocol = get_protocol("paper", epochs=40, batch_size=20, learning_rate=0.02, augmentation="none")
    whole = as_set(data, preprocessing)
    settings = {"protocol": protocol, "networks": 1, "architecture": SMALL | {"norm": "none"}, "progress": False}
    result = evaluate(whole, data, precision="bfloat16", **settings)
    assert result.mean > 85 and result.precision == "bfloat16"
    network = ConvNet(2, 3, 8, **SMALL).to(device)
    trainer = Trainer(network, whole.images, whole.labels, protocol, precision="bfloat16")
    assert trainer.step(torch.arange(20, device=device)).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())


def test_result_records_what_ran(small_set, data, preprocessing):
    result = evaluate(small_set, data, protocol=PROTOCOL, networks=1, seed=5, architecture=SMALL, progress=False)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["protocol"] == PROTOCOL.to_dict()
    assert written["architecture"] == SMALL and written["network"] == "convnet" and written["precision"] == "float32"
    assert written["seed"] == 5 and written["networks"] == 1 and written["seconds"] > 0
    assert written["accuracy_mean"] == result.accuracies[0] == written["curves"][0]["6"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": lambda x: x[:, :1]}, r"images must be \[N, 2, 8, 8\] .* stripes; got \[23, 1, 8, 8\]"),
        ({"images": lambda x: x / 0}, r"images must be finite"),
        ({"labels": lambda y: y.float()}, r"labels must be int64 \[23\], one per image; got torch.float32 \[23\]"),
        ({"labels": lambda y: y + 1}, r"labels must be below 3, the number of class names; got 3"),
        ({"class_names": lambda names: tuple("abc")}, r"the 3 classes a, b, c; stripes has the 3 classes class 0, "),
        ({"protocol": "papr"}, r"protocol must be one of paper, .*; got 'papr'; did you mean 'paper'"),
        ({"networks": 0}, r"networks must be a whole number, at least 1; got 0"),
        ({"evaluate_every": 0}, r"evaluate_every must be a whole number, at least 1, or None; got 0"),
        ({"network": "resnet"}, r"network must be one of convnet, .*; got 'resnet'"),
        ({"network": "resnet18", "architecture": {}}, r"ResNet-18 needs images of 16x16 or larger; got 8x8"),
        ({"network": "vgg11", "architecture": {}}, r"VGG-11 needs images whose sides are multiples of 32; got 8x8"),
        ({"network": "vit"}, r"vit has no setting 'width'; it has no settings"),
        ({"precision": "half"}, r"precision must be one of float32, bfloat16; got 'half'"),
        ({"together": 0}, r"together must be a whole number, at least 1, or None; got 0"),
        ({"architecture": {"norm": "bach"}}, r"norm must be one of .*; got 'bach'"),
        ({"architecture": {"depth": 4}}, r"too small for depth 4"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, data, preprocessing):
    synthetic, options = as_set(data, preprocessing, slice(23)), {"architecture": SMALL, "progress": False}
    for name, value in change.items():
        if callable(value):  # changed after the set was made
            setattr(synthetic, name, value(getattr(synthetic, name)))
        else:
            options[name] = value
    with pytest.raises(ValueError, match=message):
        evaluate(synthetic, data, **options)


def test_preprocessing_is_applied_to_the_test_set(small_set, data, preprocessing):
    """A set in another model space is no use where the test images are brought to this one."""
    shifted = Preprocessing(mean=preprocessing.mean - 3, std=preprocessing.std / 9)
    protocol = get_protocol("paper", epochs=60, batch_size=20, learning_rate=0.02, augmentation="none")
    settings = {"protocol": protocol, "networks": 1, "architecture": SMALL | {"norm": "none"}, "progress": False}
    right, wrong = as_set(data, preprocessing), as_set(data, preprocessing)
    wrong.preprocessing = shifted
    right, wrong = (evaluate(synthetic, data, **settings) for synthetic in (right, wrong))
    assert right.mean > 90 > wrong.mean + 20


def test_the_package_exports_the_function_whatever_was_imported_first():
    code = (
        "import atom_fast.evaluation.accuracy; from atom_fast.evaluation import evaluate; import atom_fast; "
        "assert callable(evaluate) and evaluate is atom_fast.evaluation.evaluate is atom_fast.evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_argument_of_another_kind_is_named(small_set, data, tmp_path):
    for arguments, message in (
        ((tmp_path, data), r"the set to evaluate must be of type SyntheticSet .*load\(path\).*; got PosixPath"),
        ((data, small_set), "the set to evaluate .*; got ImageData"),
        ((small_set, "digits"), r"data must be of type ImageData .*load_data\(name\).*; got str"),
    ):
        with pytest.raises(TypeError, match=message):
            evaluate(*arguments, progress=False)
    with pytest.raises(TypeError, match="protocol must be of type Protocol .*; got int"):
        evaluate(small_set, data, protocol=3)
    for settings in ({"networks": True}, {"networks": 1.0}, {"together": "2"}, {"seed": None}, {"evaluate_every": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a whole number"):
            evaluate(small_set, data, **settings)


def test_what_an_equal_evaluation_wrote_meanwhile_is_kept(small_set, data, tmp_path, monkeypatch):
    """Two processes with one record: the slower one, stopped early, leaves what the faster one finished."""
    settings = {"protocol": PROTOCOL, "architecture": SMALL, "progress": False, "together": 1}
    settings["record"] = tmp_path / "record.json"
    evaluate(small_set, data, networks=3, **settings)
    (whole,) = json.loads(settings["record"].read_text())
    monkeypatch.setattr(evaluation, "_find", lambda path, digest: {"seconds": 0.0, "curves": []})  # as before the other
    interrupted_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(small_set, data, networks=2, **settings)
    (kept,) = json.loads(settings["record"].read_text())
    assert kept["unfinished"] == [] and kept["accuracies"] == whole["accuracies"]


def test_evaluations_of_several_processes_in_one_record_are_all_kept(small_set, data, tmp_path):
    """A record is read and written back as a whole: without a lock one process drops what another one added."""
    path, code = tmp_path / "record.json", (
        "import sys, atom_fast.evaluation.results as r\n"
        "for number in range(40):\n"
        "    with r.locked_record(sys.argv[1]):\n"
        "        r.write_record(sys.argv[1], {'hash': sys.argv[2] + str(number), 'seconds': 0, 'curves': [], "
        "'protocol': {'epochs': 1}})"
    )  # fmt: skip
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    assert len(json.loads(path.read_text())) == 80
