from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.bundle_maker import Shape, cached_program, echo_engine, make_bundle, make_program, rewrite_manifest

from quantempo.contracts.codec import to_data
from quantempo.contracts.engine import EngineOptions
from quantempo.contracts.manifest import ArrayInput, Denoiser, FileEntry, GraphEntry
from quantempo.contracts.tensors import TensorSpec
from quantempo.engines.echo import EchoGraph, write_echo_graph
from quantempo.errors import BundleError, DataError, EngineError, RequestError
from quantempo.runtime.bundle import file_digest, read_bundle
from quantempo.runtime.images import to_unit
from quantempo.runtime.request import Request
from quantempo.runtime.rng import standard_normal
from quantempo.runtime.session import CacheUnused, Session


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.open(make_bundle(tmp_path / "b", Shape(noisy=True)), echo_engine)


def open_with(folder: Path, **shape: Any) -> Session:
    return Session.open(make_bundle(folder / "b", Shape(**shape)), echo_engine)


def test_pictures_are_grey_for_one_channel_and_rgb_for_three(session: Session, tmp_path: Path) -> None:
    grey = session(class_labels=3, seed=1, num_inference_steps=2).images
    assert [(i.mode, i.size) for i in grey] == [("L", (16, 16))]
    colour = open_with(tmp_path / "c", channels=3)(class_labels=[3, 4], seed=1, num_inference_steps=2).images
    assert [(i.mode, i.size) for i in colour] == [("RGB", (16, 16))] * 2
    assert isinstance(colour[0], Image.Image)


def test_arrays_are_the_pictures_before_rounding(session: Session) -> None:
    arguments: dict[str, Any] = {"class_labels": 3, "seed": 1, "num_inference_steps": 2}
    array = session(**arguments, output_type="np").images
    assert isinstance(array, np.ndarray)
    assert (array.shape, array.dtype) == ((1, 16, 16, 1), np.float32)
    assert 0.0 <= array.min() < array.max() <= 1.0
    assert np.array_equal(np.asarray(session(**arguments).images[0]), np.rint(array[0, ..., 0] * 255))


def test_latents_are_returned_undecoded(session: Session) -> None:
    out = session(class_labels=3, seed=1, output_type="latent")
    assert out.images is out.latents
    assert out.latents.shape == (1, 4, 8, 8)
    assert out.timings.decode < 1e-3


def test_the_decoder_gets_scaled_latents(session: Session) -> None:
    out = session(class_labels=3, seed=1, output_type="np")
    graph = session.manifest.graphs["decoder"].file
    decoder = echo_engine(session.bundle.path(graph), session._options)
    made = decoder.run({"latents": out.latents / np.float32(0.5) + np.float32(0.1)})["image"]
    assert np.array_equal(out.images, np.clip(made * 0.5 + 0.5, 0, 1).transpose(0, 2, 3, 1))


def test_many_samples_are_decoded_in_chunks_as_alone(session: Session) -> None:
    many = session(class_labels=[*range(10), 0], seed=4, num_inference_steps=1, output_type="np")
    alone = [to_unit(session.decode(many.latents[i : i + 1])) for i in range(11)]
    assert np.array_equal(many.images, np.concatenate(alone))


def test_without_a_decoder_the_latents_are_the_pixels(tmp_path: Path) -> None:
    session = open_with(tmp_path, decoder=False, latents=(3, 8, 8))
    out = session(class_labels=0, seed=0, num_inference_steps=1, output_type="np")
    scaled = out.latents / np.float32(0.5) + np.float32(0.1)
    assert np.array_equal(out.images, np.clip(scaled * 0.5 + 0.5, 0, 1).transpose(0, 2, 3, 1))


def test_a_seed_repeats_and_a_sample_does_not_depend_on_its_batch(session: Session) -> None:
    alone = session(class_labels=4, seed=9).latents
    batch = session(class_labels=[4, 5, 6], seed=9).latents
    assert np.array_equal(alone[0], batch[0])
    assert np.array_equal(batch, session(class_labels=[4, 5, 6], seed=9).latents)
    assert not np.array_equal(alone, session(class_labels=4, seed=10).latents)


def test_a_list_of_seeds_gives_each_sample_the_picture_of_its_seed(session: Session) -> None:
    both = session(class_labels=[4, 4], seed=[8, 9])
    assert np.array_equal(both.latents[1], session(class_labels=4, seed=9).latents[0])
    assert both.seeds == (8, 9)


def test_a_call_without_a_seed_tells_the_one_it_drew(session: Session) -> None:
    out = session(class_labels=1, num_inference_steps=2)
    assert isinstance(out.seeds, int)
    assert np.array_equal(session(class_labels=1, num_inference_steps=2, seed=out.seeds).latents, out.latents)
    assert session(class_labels=1, num_inference_steps=2).seeds != out.seeds


def test_given_latents_start_the_run(session: Session) -> None:
    start = standard_normal(5, 0, 0, (1, 4, 8, 8))
    drawn = session(class_labels=1, seed=5).latents
    assert np.array_equal(session(class_labels=1, seed=5, latents=start).latents, drawn)
    assert not np.array_equal(session(class_labels=1, seed=5, latents=-start).latents, drawn)


def test_torch_noise_is_used_when_asked(session: Session, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    start = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(6)).numpy()
    plain = open_with(tmp_path / "plain")
    drawn = plain(class_labels=[1, 2], seed=6, rng="torch-cpu").latents
    assert np.abs(drawn - plain(class_labels=[1, 2], latents=start).latents).max() < 1e-5
    generator = torch.Generator().manual_seed(6)
    assert np.array_equal(plain(class_labels=[1, 2], generator=generator).latents, drawn)
    after = torch.Generator().manual_seed(6)
    torch.randn((2, 4, 8, 8), generator=after)
    assert torch.equal(torch.randn(20, generator=generator), torch.randn(20, generator=after)), "as in diffusers"


def test_class_names_are_labels(session: Session) -> None:
    assert np.array_equal(session(class_labels="digit 7", seed=0).latents, session(class_labels=7, seed=0).latents)
    assert np.array_equal(session(["digit 7", 2], seed=0).latents, session(np.array([7, 2]), seed=0).latents)


def test_labels_may_be_scalars_of_any_library(session: Session) -> None:
    wanted = session(class_labels=7, seed=0).latents
    for label in (np.int32(7), np.array(7), np.array([7], np.uint8)):
        assert np.array_equal(session(class_labels=label, seed=0).latents, wanted)


def test_taps_are_seen_by_the_observer_and_not_asked_of_the_decoder(tmp_path: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "b"))
    session = Session(bundle, echo_engine, EngineOptions(extra_outputs=("blocks.0",)))
    shapes = []
    out = session.sample(
        Request(class_labels=[1, 2], guidance_scale=3.0, seed=4), session.program(3), "np",
        observer=lambda seen, outputs: shapes.append((outputs["blocks.0"].shape, seen.seeds)),
    )
    assert shapes == [((4, 6), (4, 4, 4, 4))] * 3
    assert np.array_equal(out.images, Session(bundle, echo_engine)([1, 2], guidance_scale=3.0, seed=4,
                                                                   num_inference_steps=3, output_type="np").images)


def test_guidance_is_taken_per_sample_and_defaults_to_the_bundle_s(session: Session) -> None:
    mixed = session(class_labels=[1, 2], seed=0, guidance_scale=[1.0, 4.0]).latents
    assert np.array_equal(mixed[0], session(class_labels=[1, 2], seed=0, guidance_scale=1.0).latents[0])
    assert np.array_equal(mixed[1], session(class_labels=[1, 2], seed=0, guidance_scale=4.0).latents[1])
    assert np.array_equal(session(1, seed=0).latents, session(1, seed=0, guidance_scale=1.5).latents)
    rescaled = session(class_labels=[1, 2], seed=0, guidance_scale=[1.0, 4.0], guidance_rescale=0.5).latents
    assert np.array_equal(rescaled[0], mixed[0])
    assert not np.array_equal(rescaled[1], mixed[1])


def test_branches_go_in_two_calls_where_one_would_be_too_large(tmp_path: Path) -> None:
    session = open_with(tmp_path, max_batch=3)
    calls = [session(class_labels=[1] * n, seed=0, num_inference_steps=5).timings.calls for n in (1, 2, 3)]
    assert calls == [5, 10, 10]
    both = [session(1, seed=0, guidance_mode=mode).latents for mode in ("batched", "split")]
    assert np.array_equal(*both)


def test_the_callback_is_that_of_diffusers(session: Session) -> None:
    seen = []

    def callback(pipe: Session, step: int, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert pipe is session
        seen.append((step, timestep))
        return {"latents": kwargs["latents"] * 0 if step == 1 else kwargs["latents"]}

    out = session(class_labels=1, seed=0, num_inference_steps=2, callback_on_step_end=callback)
    assert seen == [(0, 999.0), (1, 499.0)]
    assert not out.latents.any()


def test_a_program_of_another_scheduler_runs(session: Session) -> None:
    program = replace(make_program(7), scheduler="Other")
    assert session(1, seed=0, program=program).timings.calls == 7
    with pytest.raises(RequestError, match="found 8 beside a program of 7 steps"):
        session(1, program=program, num_inference_steps=8)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"class_labels": 10}, r"class_labels: found 10, wanted labels 0 to 9[\s\S]*nearest legal label is 9"),
    ({"class_labels": [3, -1]}, r"class_labels: found -1, wanted labels 0 to 9[\s\S]*nearest legal label is 0"),
    ({"class_labels": 1.5}, r"class_labels: found 1\.5, wanted whole numbers"),
    ({"class_labels": True}, r"class_labels: found True, wanted whole numbers"),
    ({"class_labels": "digit 77"}, r"found 'digit 77'[\s\S]*did you mean 'digit 7'"),
    ({}, r"class_labels: found no value, wanted labels 0 to 9"),
    ({"class_labels": []}, r"batch: found 0 samples[\s\S]*nearest legal batch is 1"),
    ({"class_labels": [1] * 5}, r"batch: found 5 samples, wanted 1 to 4[\s\S]*nearest legal batch is 4"),
    ({"class_labels": [1, 2], "seed": [1, 2, 3]}, r"class_labels: found 2 samples, wanted 3, as in seed"),
    ({"class_labels": [1, 2], "batch_size": 1}, r"batch_size: found 1 samples, wanted 2, as in class_labels"),
    ({"class_labels": 1, "num_inference_steps": 7}, r"num_inference_steps: found 7[\s\S]*nearest in the bundle is 5"),
    ({"class_labels": 1, "num_inference_steps": 2.0}, r"num_inference_steps: found 2\.0, wanted a whole number"),
    ({"class_labels": 1, "guidance_scale": -1}, r"guidance_scale: found -1, wanted finite numbers of at least 0"),
    ({"class_labels": 1, "guidance_scale": float("nan")}, r"guidance_scale: found nan"),
    ({"class_labels": 1, "guidance_rescale": 1.2}, r"guidance_rescale: found 1\.2[\s\S]*nearest legal value is 1\.0"),
    ({"class_labels": 1, "seed": -1}, r"seed: found -1[\s\S]*nearest legal seed is 0"),
    (
        {"class_labels": 1, "seed": 2**64},
        r"seed: found 18446744073709551616[\s\S]*nearest legal seed is 18446744073709551615",
    ),
    ({"class_labels": 1, "seed": "0"}, r"seed: found '0', wanted a whole number"),
    ({"class_labels": 1, "rng": "torch"}, r"rng: found 'torch'[\s\S]*did you mean 'torch-cpu'"),
    ({"class_labels": 1, "output_type": "pill"}, r"output_type: found 'pill'[\s\S]*did you mean 'pil'"),
    ({"class_labels": 1, "guidance_mode": "both"}, r"guidance_mode: found 'both', wanted 'batched' or 'split'"),
    (
        {"class_labels": 1, "guidence_scale": 2.0},
        r"unknown argument 'guidence_scale'[\s\S]*did you mean 'guidance_scale'",
    ),
    ({"class_labels": 1, "timesteps": [9, 5]}, r"timesteps: found a list of timesteps[\s\S]*program="),
    (
        {"class_labels": 1, "generator": np.random.default_rng()},
        r"generator: found a Generator, wanted a torch\.Generator",
    ),
    ({"class_labels": 1, "generator": 1, "seed": 1}, r"generator: found seed and generator, wanted one source"),
    (
        {"class_labels": 1, "latents": np.zeros((1, 4, 16, 16), np.float32)},
        r"latents: found shape \(1, 4, 16, 16\), wanted shape \(1, 4, 8, 8\)[\s\S]*nearest .* is \(1, 4, 8, 8\)",
    ),
    ({"class_labels": 1, "latents": np.zeros((1, 4, 8, 8))}, r"latents: found type float64, wanted finite float32"),
    (
        {"class_labels": 1, "latents": np.full((1, 4, 8, 8), np.nan, np.float32)},
        "latents: found NaN or infinity, wanted finite float32",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_bad_argument_is_refused_in_these_words(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    session = open_with(tmp_path, max_batch=4)
    with pytest.raises(RequestError, match=words) as caught:
        session(**arguments)
    assert "Likely cause:" in str(caught.value)
    assert "Next step:" in str(caught.value)


def test_guidance_on_a_model_without_null_label_is_refused(tmp_path: Path) -> None:
    session = open_with(tmp_path, null=False)
    assert session(1, seed=0, num_inference_steps=2).timings.calls == 2
    with pytest.raises(RequestError, match=r"guidance_scale: found 3, wanted 1\.0[\s\S]*no unconditional branch"):
        session(1, guidance_scale=3.0)


def test_class_labels_on_a_model_without_classes_are_refused(tmp_path: Path) -> None:
    session = open_with(tmp_path, classes=0)
    assert len(session(batch_size=3, seed=0, num_inference_steps=1).images) == 3
    with pytest.raises(RequestError, match="class_labels: found labels, wanted none"):
        session(class_labels=1)


def text_session(folder: Path) -> Session:
    """A model with an embedding per prompt, of free length."""
    latents = (4, 8, 8)
    inputs = (
        TensorSpec("sample", "float32", ("batch", *latents)), TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", 6)),
    )
    graph = EchoGraph(inputs, (TensorSpec("prediction", "float32", ("batch", *latents)),))
    bundle = make_bundle(folder / "b", Shape(groups=0, decoder=False))
    path = bundle / "graphs/denoiser.json"
    write_echo_graph(path, graph)
    denoiser = Denoiser(latents, (), (ArrayInput("encoder_hidden_states", "float32", ("tokens", 6)),))
    entry = GraphEntry("graphs/denoiser.json", (), "full", "float", "float32", graph.inputs, graph.outputs)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    files["graphs/denoiser.json"] = to_data(FileEntry(file_digest(path), path.stat().st_size))
    rewrite_manifest(
        bundle, files=files, denoiser=to_data(denoiser), graphs={"full.float-float32": to_data(entry)}
    )
    return Session.open(bundle, echo_engine)


def test_prompt_embeddings_of_free_length_are_fed_to_both_branches(tmp_path: Path) -> None:
    session = text_session(tmp_path)
    prompt, negative = standard_normal(0, 0, 0, (2, 7, 6)), np.zeros((1, 7, 6), np.float32)
    guided = session(
        encoder_hidden_states=prompt, negative_encoder_hidden_states=negative, guidance_scale=3.0, seed=0,
        output_type="latent",
    ).latents
    assert guided.shape[0] == 2
    plain = session(encoder_hidden_states=prompt, seed=0, output_type="latent").latents
    assert not np.array_equal(guided, plain)
    given = standard_normal(0, 0, 0, (1, 11, 6))
    longer = session(encoder_hidden_states=given, seed=0, output_type="latent").latents
    assert longer.shape[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, r"encoder_hidden_states: found no value, wanted an array float32 \(batch, tokens, 6\)"),
        (
            {"encoder_hidden_states": np.zeros((1, 7, 5), np.float32)},
            r"encoder_hidden_states: found shape \(1, 7, 5\)[\s\S]*nearest legal shape is \(1, 7, 6\)",
        ),
        ({"encoder_hidden_states": np.zeros((1, 7, 6), np.int64)}, "found type int64, wanted type float32"),
        ({"encoder_hidden_states": np.full((1, 7, 6), np.inf)}, "found NaN or infinity"),
        (
            {"encoder_hidden_states": np.zeros((1, 7, 6)), "guidance_scale": 3.0},
            r"no unconditional branch to guide with[\s\S]*pass negative_encoder_hidden_states",
        ),
        (
            {"encoder_hidden_states": np.zeros((1, 7, 6)), "negative_encoder_hidden_states": np.zeros((1, 5, 6))},
            r"negative_encoder_hidden_states: found shape \(1, 5, 6\), wanted shape \(1, 7, 6\)",
        ),
        ({"encoder_hidden_state": np.zeros((1, 7, 6))}, "did you mean 'encoder_hidden_states'"),
    ],
)
def test_bad_embeddings_are_refused_in_these_words(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        text_session(tmp_path)(output_type="latent", **arguments)


def test_an_absent_dialect_is_refused_with_those_there(session: Session) -> None:
    with pytest.raises(BundleError, match=r"found denoiser graphs of the dialects: ort, wanted dialect 'portable'"):
        Session(session.bundle, echo_engine, dialect="portable")


def test_a_graph_that_is_not_the_manifest_s_is_refused(tmp_path: Path, session: Session) -> None:
    other = tmp_path / "other.json"
    write_echo_graph(other, EchoGraph((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),)))
    with pytest.raises(EngineError, match="manifest and graph do not belong together"):
        Session(session.bundle, lambda path, options: echo_engine(other, options))


def test_closing_twice_does_nothing_and_a_closed_engine_says_so(tmp_path: Path) -> None:
    with open_with(tmp_path) as session:
        session(1, seed=0, num_inference_steps=1)
        engine = session._engines["full"]
    session.close()
    with pytest.raises(EngineError, match="a closed engine"):
        engine.bind({"batch": 1})


def test_it_samples_without_any_engine_library(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    code = (
        "import sys\nfrom quantempo.engines.registry import open_engine\n"
        "from quantempo.runtime.session import Session\n"
        f"s = Session.open({str(bundle)!r}, lambda p, o: open_engine('echo', p, o))\n"
        "s(class_labels=1, num_inference_steps=2)\n"
        "print([n for n in ('torch', 'diffusers', 'onnx', 'onnxruntime', 'scipy') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_step_count_with_a_plan_reuses_features_without_being_asked(tmp_path: Path) -> None:
    session = open_with(tmp_path, cached=(4,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = session([1, 2], seed=0, num_inference_steps=4, guidance_scale=1.0)
        plain = session([1, 2], seed=0, num_inference_steps=4, guidance_scale=1.0, feature_cache="none")
        asked = session([1, 2], seed=0, num_inference_steps=4, guidance_scale=1.0, feature_cache="plan")
    assert (cached.timings.rows, cached.timings.reused) == (8, 4)
    assert {name: t.runs for name, t in cached.timings.variants.items()} == {"full": 2, "reuse.0": 2}
    assert (plain.timings.rows, plain.timings.reused) == (8, 0)
    assert not np.array_equal(cached.latents, plain.latents)
    assert np.array_equal(cached.latents, asked.latents)
    assert np.array_equal(
        session([1, 2], seed=0, program=cached_program(4), guidance_scale=1.0).latents, cached.latents
    )


def test_a_plain_run_of_a_cached_bundle_opens_no_second_graph(tmp_path: Path) -> None:
    session = open_with(tmp_path, cached=(4,))
    session(1, seed=0, num_inference_steps=4, feature_cache="none")
    assert set(session._engines) == {"full"}
    session(1, seed=0, num_inference_steps=4)
    assert set(session._engines) == {"full", "reuse.0"}
    session.close()
    with pytest.raises(EngineError, match="a closed engine"):
        session(1, seed=0, num_inference_steps=4)


def test_a_session_that_was_closed_opens_nothing_more(tmp_path: Path) -> None:
    session = open_with(tmp_path, cached=(4,))
    session.close()
    with pytest.raises(EngineError, match=r"graphs/reuse\.0\.json: found a closed session"):
        session(1, seed=0, num_inference_steps=4)


def test_other_step_counts_and_samplers_run_uncached_with_one_notice(tmp_path: Path) -> None:
    session = open_with(tmp_path, cached=(4, 10))
    words = r"no cache plan for 5 steps of EchoScheduler, .* plans for: EchoScheduler with 4, 10 steps"
    with pytest.warns(CacheUnused, match=words) as caught:
        out = session(1, seed=0, num_inference_steps=5)
    assert len(caught) == 1
    assert out.timings.reused == 0
    assert np.array_equal(out.latents, session(1, seed=0, num_inference_steps=5, feature_cache="none").latents)
    with pytest.warns(CacheUnused, match="no cache plan for 4 steps of Other"):
        session(1, seed=0, program=replace(make_program(4), scheduler="Other"))


def test_a_plan_that_is_asked_for_and_not_there_is_refused(tmp_path: Path) -> None:
    session = open_with(tmp_path / "1", cached=(4, 10))
    words = r"feature_cache: found 'plan' for 5 steps of EchoScheduler, wanted .*\(EchoScheduler with 4, 10 steps\)"
    with pytest.raises(RequestError, match=words):
        session(1, num_inference_steps=5, feature_cache="plan")
    with pytest.raises(RequestError, match="found 'plan' for 4 steps of Other"):
        session(1, program=replace(make_program(4), scheduler="Other"), feature_cache="plan")
    with pytest.raises(RequestError, match="found 'none' beside a program that reuses features"):
        session(1, program=cached_program(4), feature_cache="none")
    with pytest.raises(RequestError, match=r"'plan' for 4 steps of EchoScheduler, .*\(none for these graphs\)"):
        open_with(tmp_path / "2")(1, num_inference_steps=4, feature_cache="plan")
    with pytest.raises(RequestError, match=r"feature_cache: found 'plans', wanted[\s\S]*did you mean 'plan'"):
        session(1, feature_cache="plans")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="feature_cache: found 'all'"):
        Session(session.bundle, echo_engine, feature_cache="all")


def test_the_session_s_own_choice_holds_where_a_call_makes_none(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", Shape(cached=(4,)))
    uncached = Session.open(bundle, echo_engine, feature_cache="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uncached(1, seed=0, num_inference_steps=4).timings.reused == 0
        assert uncached(1, seed=0, num_inference_steps=5).timings.reused == 0
    assert uncached(1, seed=0, num_inference_steps=4, feature_cache="auto").timings.reused > 0
    with pytest.raises(RequestError, match="found 'plan' for 5 steps"):
        Session.open(bundle, echo_engine, feature_cache="plan")(1, num_inference_steps=5)


def test_a_foreign_program_that_does_not_fit_the_variants_is_refused(tmp_path: Path) -> None:
    session = open_with(tmp_path, cached=(4,))
    program = cached_program(4)
    early = replace(program, calls=(replace(program.calls[0], graph="reuse.0"), *program.calls[1:]))
    with pytest.raises(DataError, match=r"call 0: found graph 'reuse\.0', which reuses feature 'cache\.0'"):
        session(1, program=early)
    assert set(session._engines) == {"full"}
