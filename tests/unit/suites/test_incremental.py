"""Class-incremental learning: the published layouts, the stand-in, and each method's own property."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from hope_megatron.suites import incremental_methods as methods
from hope_megatron.suites.candidates import ClassSummaries
from hope_megatron.suites.class_questions import stage_accuracy
from hope_megatron.suites.episodes import ASK, LABEL, WORD, episode_task, episodes, split_classes
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions, fit, small_model
from hope_megatron.suites.incremental import METHODS, forgetting, tries
from hope_megatron.suites.incremental_methods import learn_in_context, repeat_state
from hope_megatron.suites.incremental_sleep import examples
from hope_megatron.suites.labelled import load_labelled, synthetic_labelled, word_ids
from hope_megatron.suites.models import family_model, small_hope
from hope_megatron.suites.registry import build_suite
from hope_megatron.suites.running import run_suite
from hope_megatron.suites.scoring import batch_loss
from hope_megatron.suites.suite import SuiteOptions
from hope_megatron.suites.task import IGNORE
from hope_megatron.suites.training_data import TrainingData


def test_published_layouts(tmp_path):
    clinc = tmp_path / "data_full.json"
    rows = [["what is my balance", "balance"], ["send money", "transfer"]]
    clinc.write_text(json.dumps({"train": rows, "val": [], "test": rows, "oos_train": [["hm", "oos"]], "oos_test": []}))
    assert load_labelled(clinc).classes == ["balance", "transfer"]  # nothing out of scope

    banking, dbpedia = tmp_path / "banking77", tmp_path / "dbpedia"
    for directory in (banking, dbpedia):
        directory.mkdir()
    for split in ("train", "test"):
        (banking / f"{split}.csv").write_text('text,category\n"Where, then, is my card?",card_arrival\nTop up,top_up\n')
        (dbpedia / f"{split}.csv").write_text('1,"E. D. Abbott Ltd"," A ""coach"" builder"\n2,Someone," An artist"\n')
    (dbpedia / "classes.txt").write_text("Company\nArtist\n")
    loaded = load_labelled(banking)
    assert loaded.classes == ["card_arrival", "top_up"] and loaded.name == "banking77"
    assert np.array_equal(loaded.train["card_arrival"][0], word_ids("where then is my card"))
    assert load_labelled(dbpedia).classes == ["Artist", "Company"]

    (dbpedia / "test.csv").write_text("what,ever\n")
    with pytest.raises(SuiteError, match="neither a header"):
        load_labelled(dbpedia)
    with pytest.raises(SuiteError, match=r"data_full\.json"):
        load_labelled(tmp_path)
    clinc.write_text('{"train": [["a", "b"]]}')
    with pytest.raises(SuiteError, match="test"):
        load_labelled(clinc)


def test_the_stand_in_can_be_told_apart_by_words_alone():
    """Words of the training split, the rarer the more they count, decide every test sentence; nothing else would."""
    labelled = synthetic_labelled(12)
    assert len(labelled.classes) == 12
    words = {name: set(np.concatenate(labelled.train[name]).tolist()) for name in labelled.classes}
    classes_with = {w: sum(w in of for of in words.values()) for of in words.values() for w in of}
    right = total = 0
    for name in labelled.classes:
        for sentence in labelled.test[name]:
            votes = {c: sum(1 / classes_with[w] for w in sentence.tolist() if w in words[c]) for c in words}
            right, total = right + (max(votes, key=votes.__getitem__) == name), total + 1
    assert right / total > 0.9
    many = synthetic_labelled(230)
    of_word = Counter(word for c in many.classes for word in set(np.concatenate(many.train[c]).tolist()))
    assert min(of_word.values()) > 1, "what is learnt of a class's words serves for others"
    again = synthetic_labelled(12)
    assert all(np.array_equal(a, b) for c in labelled.classes for a, b in zip(labelled.train[c], again.train[c]))


def test_episodes_ask_the_label_that_they_tell():
    labelled = synthetic_labelled(12)
    base, groups = split_classes(labelled, 3)
    assert sorted([*base, *groups[0], *groups[1], *groups[2]]) == labelled.classes
    assert [len(group) for group in groups] == [2, 2, 2]
    batch = episodes(
        labelled.train, base, 5, np.random.default_rng(0), num_classes=2, num_sentences=100, num_labels=3, shots=4
    )
    of_sentence = {tuple(s.tolist()): name for name in base for s in labelled.train[name]}
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist()):
        sentence, labels = [], {}
        for i, token in enumerate(tokens):
            if token == ASK:
                name, label = of_sentence[tuple(sentence)], tokens[i + 1]
                assert LABEL <= label < LABEL + 3
                assert targets[i] == (label if name in labels else IGNORE), "nothing tells a class's first label"
                assert labels.setdefault(name, label) == label
                sentence = []
            else:
                assert targets[i] == IGNORE
                if WORD <= token < LABEL:
                    sentence.append(token - WORD)
        assert len(labels) == 2 and len(set(labels.values())) == 2
    with pytest.raises(SuiteError, match="at least 14"):
        split_classes(labelled, 7)


def test_groups_stay_small_and_all_other_classes_are_for_learning_to_learn():
    labelled = synthetic_labelled(100)
    base, groups = split_classes(labelled, 5)
    assert [len(group) for group in groups] == [6] * 5 and len(base) == 70
    task = episode_task(labelled, 5, shots=2)
    assert task.lessons == ("2 x 1", "6 x 1", "6 x 3") and task.bins == ("6 x 100",)
    for name in (*task.lessons, *task.bins):
        classes, most = map(int, name.split(" x "))
        for row in TrainingData(task, 0).batch(0, 3, name).tokens.tolist():
            told: dict[int, set[tuple[int, ...]]] = {}
            sentence: list[int] = []
            for token in row:
                if token >= LABEL:
                    told.setdefault(token, set()).add(tuple(sentence))
                    sentence = []
                elif token != ASK:
                    sentence.append(token)
            assert len(told) == classes and max(told) < LABEL + 30
            assert all(len(sentences) <= most for sentences in told.values())


def test_sentences_of_the_three_splits_are_disjoint_and_change_with_the_seed():
    labelled = synthetic_labelled(12)
    kept, held = zip(*(labelled.without_validation(seed) for seed in (0, 1)))
    for rest, validation in zip(kept, held):
        for name in labelled.classes:
            train, asked, test = (
                {words.tobytes() for words in part[name]} for part in (rest.train, validation.test, labelled.test)
            )
            assert train and asked and not train & asked and not train & test and not asked & test
            assert validation.train[name] is rest.train[name] and rest.test is labelled.test
    first, second = ({w.tobytes() for c in part.classes for w in part.test[c]} for part in held)
    assert first != second
    assert split_classes(labelled, 3, 0) != split_classes(labelled, 3, 1)


def test_validation_episodes_are_of_sentences_that_training_never_has():
    labelled = synthetic_labelled(12)
    data = TrainingData(episode_task(labelled, 3, shots=4), 2)
    sentences = [_sentences(batch) for batch in (data.batch(0, 40), data.validation(40))]
    assert sentences[0] and sentences[1] and not sentences[0] & sentences[1]
    with pytest.raises(SuiteError, match="the test is of other classes"):
        episode_task(labelled, 3, shots=4).source("test", 2)


def _sentences(batch) -> set[tuple[int, ...]]:
    found, words = set(), []
    for token in batch.tokens.ravel().tolist():
        if token == ASK:
            found.add(tuple(words))
            words = []
        elif WORD <= token < LABEL:
            words.append(token)
    return found


def test_class_summaries_name_the_class_of_a_sentence():
    """Also against the distance written out: the nearest mean in the space that the shared covariance makes round."""
    labelled = synthetic_labelled(12)
    summaries = ClassSummaries(torch.randn(LABEL, 48, generator=torch.Generator().manual_seed(0)))
    for name in labelled.classes:  # class by class, as they arrive
        summaries.add({name: labelled.train[name]})
    asked = [(name, words) for name in labelled.classes for words in labelled.test[name]]
    found = [summaries.candidates(words, 3) for _, words in asked]
    assert np.mean([name == names[0] for (name, _), names in zip(asked, found)]) > 0.6
    assert np.mean([name in names for (name, _), names in zip(asked, found)]) > 0.85
    points = {c: np.stack([summaries.embed(w) for w in labelled.train[c]]) for c in labelled.classes}
    within = np.concatenate([p - p.mean(0) for p in points.values()])
    covariance = within.T @ within / len(within)
    inverse = np.linalg.inv(covariance + 0.1 * np.trace(covariance) / 48 * np.eye(48))
    for (_, words), names in list(zip(asked, found))[:20]:
        away = {c: p.mean(0) - summaries.embed(words) for c, p in points.items()}
        assert min(away, key=lambda c: away[c] @ inverse @ away[c]) == names[0]


def test_candidates_alone_are_read_before_a_question():
    """InCA: of a class that is no candidate, nothing is read and nothing can be answered."""
    labelled = synthetic_labelled(12)
    _, groups = split_classes(labelled, 3)
    names = [name for group in groups for name in group]
    model = small_model(family_model("deltanet", small_hope(LABEL + 6, width=16, layers=1, heads=2, chunk_tokens=8)), 0)
    shown = {name: labelled.train[name][:4] for name in names}
    stage = learn_in_context(model, shown, groups, 0)[-1]
    assert stage.classes == names
    read = []
    handle = model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    question = labelled.test[names[0]][0]
    share = stage_accuracy(model, stage, {names[0]: [question]}, shown, 0)
    handle.remove()
    summaries = ClassSummaries(model.embedding.weight)
    summaries.add(shown)
    candidates = summaries.candidates(question)
    told = [token - LABEL for token in read[0].ravel().tolist() if token >= LABEL]
    assert sorted(told) == sorted(names.index(name) for name in candidates for _ in range(4))
    assert share in (0.0, 1.0) and (share == 0.0 or names[0] in candidates)


def test_forgetting_is_what_was_lost():
    assert forgetting([[0.9], [0.5, 0.8], [0.1, 0.6, 1.0]]) == pytest.approx(((0.9 - 0.1) + (0.8 - 0.6)) / 2)


@pytest.mark.parametrize("family", ["hope", "transformer_pp"])
def test_a_repeated_state_goes_on_like_the_stream(family):
    model = small_model(family_model(family, small_hope(61, width=32, layers=2, heads=2, chunk_tokens=4)), 0).eval()
    tokens = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = model(tokens[:1, :6], return_state=True).state
        repeated = model(tokens[:, 6:], state=repeat_state(model, state, 3)).logits
        for i in range(3):
            alone = model(tokens[i : i + 1, 6:], state=state).logits
            torch.testing.assert_close(repeated[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_ewc_holds_what_an_earlier_group_needs():
    labelled = synthetic_labelled(8)
    _, (first, second) = split_classes(labelled, 2)
    labels = {name: i for i, name in enumerate([*first, *second])}
    config = family_model("deltanet", small_hope(LABEL + 8, width=16, layers=1, heads=2, chunk_tokens=8))
    left = {}
    for strength in (0.0, 1e4):
        model, rng = small_model(config, 0), np.random.default_rng(0)
        anchors = methods.fisher(
            model, lambda rng=rng: methods._single_sentences(labelled.train, labels, first, 1, rng)
        )
        penalty = partial(methods.ewc_penalty, anchors, strength)
        draw = partial(methods._single_sentences, labelled.train, labels, second, 4)
        fit(
            model,
            lambda step, draw=draw: draw(np.random.default_rng(step)),
            FitOptions(steps=12, lr=3e-3),
            penalty=penalty,
        )
        left[strength] = methods.ewc_penalty(anchors, 2.0).item()
    assert 0 < left[1e4] < 0.5 * left[0.0]


def test_fisher_of_one_sentence_is_its_squared_gradient():
    labelled = synthetic_labelled(4)
    model = small_model(small_hope(LABEL + 4, width=16, layers=1, heads=2, chunk_tokens=8), 0)
    batch = methods._single_sentences(
        {"class 000": labelled.train["class 000"][:1]}, {"class 000": 0}, ["class 000"], 1, np.random.default_rng(0)
    )
    anchors = methods.fisher(model, lambda: batch, samples=2)
    batch_loss(model, batch).backward()
    assert len(anchors) == len(list(model.parameters()))
    for parameter, _, square in anchors:
        expected = parameter.grad**2 if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(square, expected, atol=1e-7, rtol=1e-4)


def test_the_suite_from_end_to_end():
    options = SuiteOptions(families=("hope",), seeds=1, steps=3, quick=True)
    results = run_suite(build_suite("classes", options), None, {}, tell=lambda line: None)
    tested = {cell.subject: outcome for cell, outcome in results.outcomes.items() if not cell.is_try}
    assert set(tested) == {f"hope: {method}" for method in METHODS}
    assert all(not outcome.scores for cell, outcome in results.outcomes.items() if cell.is_try)
    for outcome in tested.values():
        for scores in outcome.scores.values():
            assert list(scores) == ["after 1", "after 2", "after 3", "forgetting"]
            assert all(0 <= scores[f"after {i}"] <= 1 for i in (1, 2, 3))


def test_every_method_has_as_many_tries():
    model = small_hope(64, width=32, layers=1, heads=2, chunk_tokens=8)
    found = [tries(model, method, SuiteOptions()) for method in METHODS]
    assert {len(grid) for grid in found} == {2} and len(set(found[2].values())) == 2
    assert {this.strength for this in found[3].values()} == {1e6, 1e8}
    assert {this.tuning_rate for this in found[4].values()} == {3e-3, 1e-2}


def test_a_day_of_classes_is_read_example_by_example():
    stream = [WORD + 3, WORD + 4, ASK, LABEL + 1, WORD + 5, ASK, LABEL]
    rows = [(tokens.tolist(), targets.tolist()) for tokens, targets in examples(stream)]
    assert rows == [(stream[:4], [IGNORE, IGNORE, LABEL + 1, IGNORE]), (stream[4:], [IGNORE, LABEL, IGNORE])]
