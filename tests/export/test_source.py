import shutil

import pytest
from support import tiny_models

from quantempo.contracts.manifest import ClassInput
from quantempo.errors import NotAModelDirectory, PickleCheckpoint, UnsupportedModel
from quantempo.export.families import family_of
from quantempo.export.source import open_source


def unet_source(folder):
    return open_source(folder, folder / "scheduler")


def test_pipeline_directory_is_described():
    source = open_source(tiny_models.dit_pipeline())
    assert (source.class_name, source.pipeline) == ("DiTTransformer2DModel", "DiTPipeline")
    assert source.denoiser.name == "transformer"
    assert source.scheduler.name == "scheduler"
    assert source.vae is not None
    assert source.labels == {str(i): f"digit {i}" for i in range(10)}
    assert list(source.labels) == [str(i) for i in range(10)]


def test_denoiser_directory_with_a_scheduler():
    folder = tiny_models.unet()
    source = unet_source(folder)
    assert (source.denoiser, source.vae, source.pipeline) == (folder, None, None)


def test_digest_follows_weights_and_config_not_the_place(tmp_path):
    folder = tiny_models.unet()
    copy = tiny_models.edited(folder, tmp_path / "copy")
    assert unet_source(copy).digest == unet_source(folder).digest
    other = tiny_models.edited(folder, tmp_path / "other", norm_eps=1e-3)
    assert unet_source(other).digest != unet_source(folder).digest
    weights = copy / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert unet_source(copy).digest != unet_source(folder).digest


def test_missing_path_is_refused_as_local_only(tmp_path):
    with pytest.raises(NotAModelDirectory, match=r"no such directory.*local(?s:.*)hub name"):
        open_source(tmp_path / "facebook" / "DiT-XL-2-256")


def test_other_directory_is_refused_with_its_listing(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(NotAModelDirectory, match=r"it holds notes\.txt.*model_index\.json"):
        open_source(tmp_path)


def test_denoiser_directory_without_scheduler_asks_for_one():
    with pytest.raises(NotAModelDirectory, match=r"without a scheduler(?s:.*)--scheduler DIR"):
        open_source(tiny_models.unet())


def test_wrong_scheduler_directory_is_refused(tmp_path):
    with pytest.raises(NotAModelDirectory, match=r"scheduler_config\.json"):
        open_source(tiny_models.unet(), tmp_path)


def test_pipeline_without_denoiser_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(NotAModelDirectory, match=r"no denoiser.*transformer/ or unet/"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickle_only_checkpoint_is_refused(tmp_path, name):
    copy = tiny_models.edited(tiny_models.unet(), tmp_path / "copy")
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    (copy / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(PickleCheckpoint, match=rf"{name}\), wanted safetensors(?s:.*)safe_serialization=True"):
        unet_source(copy)


def test_single_pickle_file_is_refused(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"\x80\x04N.")
    with pytest.raises(PickleCheckpoint, match=r"model\.ckpt"):
        open_source(file)


def test_single_safetensors_file_gets_the_conversion_hint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(NotAModelDirectory, match=r"single file(?s:.*)save_pretrained"):
        open_source(file)


def test_pickled_vae_is_refused_before_any_work(tmp_path):
    copy = tmp_path / "pipeline"
    shutil.copytree(tiny_models.dit_pipeline(), copy)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(PickleCheckpoint, match="vae"):
        open_source(copy)


def test_missing_weights_are_refused(tmp_path):
    copy = tiny_models.edited(tiny_models.unet(), tmp_path / "copy")
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(NotAModelDirectory, match="no weights"):
        unet_source(copy)


def test_unknown_class_names_the_known_ones(tmp_path):
    copy = tiny_models.edited(tiny_models.unet(), tmp_path / "copy", _class_name="UNet2DModal")
    words = r"'UNet2DModal'(?s:.*)did you mean 'UNet2DModel'(?s:.*)--code FILE.py"
    with pytest.raises(UnsupportedModel, match=words):
        unet_source(copy)


def test_published_dit_checkpoints_keep_their_old_class_name(tmp_path):
    copy = tmp_path / "pipeline"
    shutil.copytree(tiny_models.dit_pipeline(), copy)
    old = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    tiny_models.edited(copy / "transformer", copy / "other", **old)
    shutil.rmtree(copy / "transformer")
    (copy / "other").rename(copy / "transformer")
    assert open_source(copy).class_name == "DiTTransformer2DModel"


def test_file_variant_is_found(tmp_path):
    copy = tiny_models.edited(tiny_models.unet(), tmp_path / "copy")
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.rename(copy / "diffusion_pytorch_model.fp16.safetensors")
    assert unet_source(copy).variant == "fp16"


def test_dit_family_has_a_null_class_and_cuts_the_variance():
    family = family_of(open_source(tiny_models.dit_pipeline()))
    (labels,) = family.classes
    assert (labels.count, labels.null, labels.names["3"]) == (10, 10, "digit 3")
    assert (family.sample_shape, family.output_channels) == ((4, 8, 8), 8)
    assert [spec.name for spec in family.inputs()] == ["sample", "timestep", "class_labels"]


def test_unet_family_takes_its_last_class_as_null():
    assert family_of(unet_source(tiny_models.unet())).classes == (ClassInput("class_labels", count=10, null=10),)


def test_condition_unet_family_takes_embeddings():
    family = family_of(unet_source(tiny_models.condition_unet()))
    (prompt,) = family.arrays
    assert (prompt.name, prompt.shape, family.classes) == ("encoder_hidden_states", (77, 24), ())
    assert family.example(3)["encoder_hidden_states"].shape == (3, 77, 24)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", "audio"),
        ("class_embed_type", "timestep"),
        ("encoder_hid_dim_type", "audio_proj"),
        ("attention_type", "gated"),
        ("cross_attention_dim", [24, 32]),
        ("sample_size", None),
        ("out_channels", 5),
    ],
)
def test_condition_unet_with_additions_is_refused_by_key(tmp_path, key, value):
    copy = tiny_models.edited(tiny_models.condition_unet(), tmp_path / "copy", **{key: value})
    with pytest.raises(UnsupportedModel, match=f"key '{key}'"):
        family_of(unet_source(copy))
