"""Table 6: the search on a few narrow candidates of digits."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from atom_fast._files import claimed
from atom_fast.data.sources import load_data
from atom_fast.evaluation.sets import select
from atom_fast.networks import convnet_search_space
from benchmarks import paper
from benchmarks.accuracy.work import DataCache
from benchmarks.search import ranking, table, training
from benchmarks.search.grid import Candidate, candidates
from benchmarks.search.plan import check_names, plan
from benchmarks.search.proxies import make_proxies
from benchmarks.search.run import run
from tests.benchmarks.tiny import command

SMALL = {"ipc": 1, "widths": [4], "sample": 4, "epochs": 1, "reference_epochs": 1, "iterations": 2}


def search(output, **changes):
    """The record of a small search without what differs from run to run."""
    chosen = plan("digits", **{**SMALL, "proxies": ["random", "early"], **changes})
    record = run(chosen, output, device="cpu", progress=False, report=lambda text: None)
    return without_times(record)


def without_times(record):
    found = json.loads(json.dumps(record))
    for entry in (*found["proxies"].values(), *filter(None, [found["reference"]])):
        for seed in entry["seeds"]:
            del seed["seconds"]
    return found


def made(output, *names, seeds=1, **protocol):
    """Proxies of digits."""
    chosen = plan("digits", **{**SMALL, "proxies": names, "seeds": seeds, "reference_epochs": 0})
    chosen = dataclasses.replace(chosen, protocol=dataclasses.replace(chosen.protocol, **protocol))
    cache = DataCache(None, download=False, device=torch.device("cpu"), progress=False)
    return list(make_proxies(chosen, output, cache))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


pytestmark = pytest.mark.usefixtures("one_thread")
CANDIDATE = Candidate(2, 4, "relu", "instance", "avg2")
OTHER = Candidate(1, 8, "sigmoid", "batch", "max2")


# Grid


def test_the_grid_has_720_names_that_say_what_they_are():
    grid = candidates()
    assert len({candidate.name for candidate in grid}) == 720
    assert [dataclasses.asdict(candidate) for candidate in grid] == list(convnet_search_space())
    assert Candidate(3, 128, "relu", "instance", "avg2").name == "depth3-width128-relu-instance-avg2"


def test_a_sample_holds_every_smaller_one_in_the_order_of_the_grid():
    small, large = candidates(sample=20), candidates(sample=50)
    assert set(small) < set(large) and len(large) == 50
    assert large == [candidate for candidate in candidates() if candidate in set(large)]


def test_a_candidate_draws_from_its_seed_and_name():
    seeds = {candidate.seed(seed) for candidate in candidates() for seed in range(3)}
    assert len(seeds) == 3 * 720


def test_what_takes_longer_costs_more():
    shape = (3, 32, 32)
    assert Candidate(3, 64, "relu", "none", "none").cost(shape) > Candidate(3, 64, "relu", "none", "avg2").cost(shape)
    assert Candidate(3, 64, "relu", "none", "avg2").cost(shape) > Candidate(2, 32, "relu", "none", "avg2").cost(shape)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"widths": [6]}, "multiples of 4, for norm 'group'; got 6"),
        ({"widths": [8, 8]}, "different numbers"),
        ({"sample": 1}, "from 2 to 720; got 1"),
        ({"sample": 721}, "from 2 to 720; got 721"),
    ],
)
def test_a_grid_that_is_none_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        candidates(**options)


# Rank correlation


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-1e3, 1e3)), min_size=2, max_size=30))
def test_correlation_is_scipys_also_with_equal_values(pairs):
    one, other = np.array(pairs).T
    np.testing.assert_array_equal(ranking.ranks(one), rankdata(one))
    found = ranking.spearman(one, other)
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)


def test_a_failure_ranks_last():
    accuracies = {"accuracies": [30.0, None, 10.0]}
    assert list(ranking.ranks(table.scores(accuracies))) == [3, 1, 2]


def test_the_interval_holds_the_correlation_and_narrows_with_more_candidates():
    generator = np.random.default_rng(0)

    def width(count):
        reference = generator.normal(size=count)
        one = reference + generator.normal(size=count)
        low, high = ranking.interval([one], reference)
        assert low < ranking.spearman(one, reference) < high
        return high - low

    assert width(400) < 0.6 * width(40)
    assert ranking.interval([np.zeros(9)], np.arange(9.0)) is None


def test_the_best_are_a_share_and_never_fewer_than_five():
    values = np.arange(100.0)
    assert sorted(ranking.best(values, 0.1)) == list(range(90, 100))
    assert sorted(ranking.best(values[:9], 0.1)) == [4, 5, 6, 7, 8]


# Training


def trained_weights(monkeypatch):
    """Replace the accuracy by a sum over the weights, which tells networks apart to the last bit."""
    monkeypatch.setattr(
        training, "accuracy", lambda network, *test: sum(p.double().abs().sum() for p in network.parameters()).item()
    )
    monkeypatch.setattr(training, "round", lambda value, digits: value, raising=False)


def test_a_result_depends_on_name_seed_and_proxy_alone(tmp_path, monkeypatch):
    trained_weights(monkeypatch)
    everything = made(tmp_path, "random", "early", seeds=2)
    for candidate in (OTHER, CANDIDATE):
        assert training.train_candidate(candidate, everything, tmp_path / "together", wait=False)
    together = training.read_results(tmp_path / "together", CANDIDATE)
    assert len({result["accuracy"] for result in together.values()}) == len(everything) == 4
    for proxy in reversed(everything):
        folder = tmp_path / proxy.key
        training.train_candidate(CANDIDATE, [proxy], folder, wait=False)
        assert training.read_results(folder, CANDIDATE)[proxy.key]["accuracy"] == together[proxy.key]["accuracy"]


def test_all_candidates_see_the_same_batches_kept_or_drawn_again(tmp_path, monkeypatch):
    trained_weights(monkeypatch)
    proxies = made(tmp_path, "random", "early")
    for kept in (2**25, 0):
        monkeypatch.setattr(training, "_KEPT_BYTES", kept)
        for candidate in (OTHER, CANDIDATE):
            training.train_candidate(candidate, proxies, tmp_path / str(kept), wait=False)
    for candidate in (OTHER, CANDIDATE):
        kept, drawn = (training.read_results(tmp_path / folder, candidate) for folder in (str(2**25), "0"))
        assert [result["accuracy"] for result in kept.values()] == [result["accuracy"] for result in drawn.values()]


def test_networks_of_one_shape_trained_at_once_are_what_each_is_alone(tmp_path, monkeypatch):
    trained_weights(monkeypatch)
    proxies = made(tmp_path, "random", seeds=3)
    together = [result["accuracy"] for result in training._at_once(CANDIDATE, proxies)]
    alone = [result["accuracy"] for proxy in proxies for result in training._at_once(CANDIDATE, [proxy])]
    assert together == alone and len(set(alone)) == 3


def test_early_stopping_takes_as_many_steps_and_every_image_before_one_comes_again(tmp_path, monkeypatch):
    proxies = {proxy.name: proxy for proxy in made(tmp_path, "random", "early", epochs=150)}
    seen = {name: [] for name in proxies}
    for name, proxy in proxies.items():
        trainer = training._trainer(CANDIDATE, proxy)
        trainer.restart(0)
        step = trainer._gather or trainer.images.index_select
        monkeypatch.setattr(trainer, "step", lambda indices, name=name: seen[name].append(len(indices)))
        rows = []
        for epoch in range(proxy.protocol.epochs):
            trainer.train_epoch(epoch)
            if name == "early":
                rows.append(trainer._rows.clone())
                images, labels = step(torch.arange(10)), trainer.labels
                assert torch.equal(images, proxy.images[rows[-1]]) and torch.equal(labels, proxy.labels[rows[-1]])
    assert seen["random"] == seen["early"] == [10] * 150
    assert torch.bincount(torch.cat(rows)).tolist().count(2) == 1500 - 1400


def test_a_candidate_in_training_elsewhere_is_left_to_it(tmp_path):
    proxies = made(tmp_path, "random")
    (tmp_path / "locks").mkdir()
    with claimed(tmp_path / "locks" / CANDIDATE.name, wait=False):
        assert not training.train_candidate(CANDIDATE, proxies, tmp_path, wait=False)
    assert training.train_candidate(CANDIDATE, proxies, tmp_path, wait=False)
    assert training.read_results(tmp_path, CANDIDATE).keys() == {proxies[0].key}


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / f"{CANDIDATE.name}.json").write_text('{"format": "benchmarks.search.candidate", "trained": {"a": {}}}')
    with pytest.raises(ValueError, match=f"{CANDIDATE.name}.json does not hold .*remove it to train"):
        training.read_results(tmp_path, CANDIDATE)


def test_a_candidate_that_diverges_or_needs_too_much_memory_is_named_and_ranks_last(tmp_path, monkeypatch):
    [proxy] = made(tmp_path, "random", learning_rate=1e30)
    training.train_candidate(CANDIDATE, [proxy], tmp_path, wait=False)
    assert training.read_results(tmp_path, CANDIDATE)[proxy.key]["reason"] == "diverged"
    trainer = training._trainer

    def too_large(candidate, proxy):
        if candidate.norm == "batch" and proxy.name == "random":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999999999 bytes")
        return trainer(candidate, proxy)

    monkeypatch.setattr(training, "_trainer", too_large)
    record = search(tmp_path / "search", sample=8, reference_epochs=0)
    failed = {name: "out of memory" for name in record["candidates"] if "-batch-" in name}
    assert failed and record["proxies"]["random"]["seeds"][0]["failed"] == failed
    assert record["proxies"]["early"]["seeds"][0]["failed"] == {}
    text = (tmp_path / "search" / "table6.md").read_text()
    assert f"Random, seed 0: {len(failed)} out of memory, ranked last: {next(iter(failed))}" in text


# Search


def test_a_stopped_search_goes_on_and_ends_with_the_same_table(tmp_path, monkeypatch):
    whole = search(tmp_path / "whole", reference_epochs=0)
    write, left = training.write_atomically, [5]  # of 6 results: two candidates and one result of the third

    def until(*arguments):
        write(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_atomically", until)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "stopped", reference_epochs=0)
    finished = {path.name: path.read_text() for path in (tmp_path / "stopped" / "candidates").glob("*.json")}
    assert "1 of 3 candidates are not finished" in (tmp_path / "stopped" / "table6.md").read_text()
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert search(tmp_path / "stopped", reference_epochs=0) == whole
    complete = [text for name, text in finished.items() if len(json.loads(text)["trained"]) == 2]
    now = [path.read_text() for path in (tmp_path / "stopped" / "candidates").glob("*.json")]
    assert set(complete) <= set(now)  # nothing is trained twice


def test_processes_share_the_candidates_and_find_what_one_finds(tmp_path):
    alone = search(tmp_path / "alone", reference_epochs=0)
    torch.set_num_threads(2)
    assert search(tmp_path / "shared", reference_epochs=0) == alone


def test_candidates_that_do_not_fit_are_named_and_count_nowhere(tmp_path):
    record = search(tmp_path, sample=8, proxies=["random"], reference_epochs=0)
    unfit = [candidate.name for candidate in candidates([4], 8) if candidate.depth == 4 and candidate.pooling != "none"]
    assert unfit and list(record["unfit"]) == unfit and not set(unfit) & set(record["candidates"])
    assert f"{len(unfit)} of 8 candidates cannot be built" in (tmp_path / "table6.md").read_text()


def test_sets_of_any_kind_are_proxies(tmp_path):
    data = load_data("digits")
    chosen = select(data, "random", 2, progress=False)
    files = [
        chosen.save(tmp_path / "own.safetensors"),
        chosen.export(tmp_path / "other.pt"),
        chosen.export(tmp_path / "png"),
    ]
    names = [f"{name}={path}" for name, path in zip(("own", "pt", "images"), files, strict=True)]
    found = made(tmp_path, *names)
    assert [proxy.stored for proxy in found] == [20, 20, 20]
    for proxy in found:
        training.train_candidate(CANDIDATE, [proxy], tmp_path, wait=False)
        torch.testing.assert_close(proxy.images, found[0].images, atol=0.01, rtol=0)
    results = training.read_results(tmp_path, CANDIDATE)
    assert results[found[0].key]["accuracy"] == pytest.approx(results[found[1].key]["accuracy"], abs=1)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["atoms"], "must be one of random, .*got 'atoms'; did you mean 'atom'"),
        (["random", "random=x.pt"], "given twice"),
        (["early=x.pt"], "none of random.*got 'early'"),
        (["a/b=x.pt"], "letters, digits and hyphens"),
        (["mine=nowhere.pt"], "no set at nowhere.pt for the proxy 'mine'"),
    ],
)
def test_a_proxy_that_is_none_is_refused(names, named):
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        check_names(names)


def test_a_set_of_other_classes_is_refused(tmp_path):
    data = load_data("digits")
    other = dataclasses.replace(select(data, "random", 1, progress=False).preprocessing)
    chosen = select(data, "random", 1, preprocessing=other, progress=False)
    chosen.class_names = tuple("abcdefghij")
    with pytest.raises(ValueError, match="of the classes a, b, c, .*; digits has"):
        made(tmp_path, f"mine={chosen.save(tmp_path / 'mine.safetensors')}")


# Table


def record(dataset="digits", ipc=1, **proxies):
    """A record of 40 candidates; a proxy is a list of accuracies for each seed."""
    count = 40
    names = [candidate.name for candidate in candidates(sample=count)]

    def entry(seeds):
        return {"stored": 10, "count": 10, "seeds": [{"accuracies": own, "seconds": 90, "failed": {}} for own in seeds]}

    return {
        "dataset": dataset, "data": dataset, "fingerprint": "0", "ipc": ipc, "widths": [32], "sample": count,
        "grid": count, "protocol": {"epochs": 3}, "reference_epochs": 1, "candidates": names, "unfit": {},
        "unfinished": 0,
        "proxies": {name: entry(seeds) for name, seeds in proxies.items()},
        "reference": entry([[float(number) for number in range(count)]]),
    }  # fmt: skip


def test_the_table_follows_from_the_record():
    rising = [float(number) for number in range(40)]
    found = record(atom=[rising, rising], random=[rising[::-1], rising], dm=[[50.0] * 40])
    atom, random, dm, whole = table.rows(found)
    assert (atom.rho, atom.rho_best, atom.performance, atom.minutes) == (1.0, 1.0, 39.0, 1.5)
    assert atom.chosen == found["candidates"][-1] and atom.interval == (1.0, 1.0)
    assert random.rho == 0 and random.deviation == 1 and random.performance == 19.5
    assert dm.rho is None and dm.performance == 19.5  # of all, as all are equal
    assert whole.name == "reference"
    text = table.render(found)
    assert "| ATOM                  | 39.0" in text and "1.00 ± 0.00 (1.00 to 1.00)" in text and "0.75" in text


def test_the_papers_figures_stand_beside_ones_of_its_own_setting():
    rising = [float(number) for number in range(40)]
    text = table.render(record(*paper.TABLE6_CELL, atom=[rising]))
    assert "39.0 (paper: 88.9)" in text and "(paper: 0.75)" in text and "1.5 (paper: 206)" in text


def test_the_picture_is_drawn(tmp_path):
    rising = [float(number) for number in range(40)]
    table.draw(record(atom=[rising], random=[[None, *rising[1:]]]), tmp_path / "table6.png")
    assert (tmp_path / "table6.png").stat().st_size > 10_000


def test_the_command_prints_the_table(tmp_path):
    options = "--proxies random --ipc 1 --widths 4 --sample 4 --epochs 1 --reference-epochs 1 --device cpu --quiet"
    printed, _ = command("table6", *options.split(), "--out", tmp_path)
    assert "| Random" in printed and "1 on the whole data; 1 seed" in " ".join(printed.split())
    assert (tmp_path / "table6.png").stat().st_size > 10_000


def test_bad_options_are_refused_in_one_line(tmp_path):
    _, error = command("table6", "--widths", "6", "--out", tmp_path, code=2)
    assert error.strip().splitlines()[-1] == "Error: widths must be multiples of 4, for norm 'group'; got 6"
