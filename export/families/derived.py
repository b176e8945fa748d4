"""Families from a class's signature and configuration, for denoisers that have no file of their own.

The names of `forward`'s arguments say what they are, and the configuration how wide.  What neither says (how a sample's
axes are ordered, which of two widths counts) is tried: the class is made without weights (on torch's `meta` device) and
called.  Nothing is guessed: an argument that has to be given and is not understood, or a call that does not run, is
refused with the list of all arguments.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantempo.contracts.manifest import ArrayInput, ClassInput
from quantempo.errors import UnsupportedModel
from quantempo.export.classes import make, whole_config
from quantempo.export.families.base import (
    SAMPLE,
    SAMPLE_CONDITION,
    TIMESTEP,
    Family,
    FamilyContext,
    Feeds,
)
from quantempo.export.families.conventions import Convention, convention_of
from quantempo.export.messages import first_line, quiet

logger = logging.getLogger(__name__)
SAMPLE_ARGUMENTS = ("sample", "hidden_states", "latents", "x")
TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t")
PROMPTS = ("encoder_hidden_states", "context")
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask")
SIZES = ("original_size", "target_size", "crop_coords")
"""Pairs of numbers, one row per sample."""

VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)

CHANNELS = ("in_channels", "in_dim", "c_in", "channels")
RETURNED = ("out_channels", "out_dim", "c_out")
PROMPT_WIDTHS = (
    "joint_attention_dim", "caption_channels", "cap_feat_dim", "text_embed_dim", "text_dim", "context_in_dim",
    "context_dim", "text_in_dim", "encoder_hid_dim", "encoder_hidden_size", "cross_attention_dim",
)
"""Keys for the width of a prompt's embedding, in the order in which they are tried: where a model projects the prompt,
`cross_attention_dim` is what it is projected to."""
PROMPT_LENGTHS = ("max_text_seq_length", "max_sequence_length", "text_len")
TOKENS = 77
"""Prompt length of models whose configuration and text encoder name none."""
VECTORS: Mapping[str, tuple[str, ...]] = {
    "pooled_projections": ("pooled_projection_dim", "in_text_dim2"),
    "pooled_embeds": ("text_emb_dim",),
    "pooled_text_emb": ("cond_embed_dim",),
    "timestep_cond": ("time_cond_proj_dim",),
}
"""Arguments [batch, width] by the keys for the width; without one they are left out."""
LABELS: Mapping[str, int] = {"num_embeds_ada_norm": 0, "num_class_embeds": -1, "num_classes": 0}
"""Keys for the number of classes, and what to add to get the null class."""
TURNED_ON: Mapping[str, str] = {
    "guidance_embeds": "guidance", "image_dim": "encoder_hidden_states_image", "added_kv_proj_dim":
    "encoder_hidden_states_image", "image_proj_dim": "image_embeds", "ofs_embed_dim": "ofs",
    "use_rotary_positional_embeddings": "image_rotary_emb", "addition_embed_type": "added_cond_kwargs",
    "text_embed_2_dim": "encoder_hidden_states_2", "text_embed_dim_t5": "encoder_hidden_states_t5",
    "cross_attention_dim_t5": "encoder_hidden_states_t5", "use_additional_conditions": "added_cond_kwargs",
    "class_embed_type": "class_labels", "guidance_embed": "guidance", "encoder_hid_dim_type": "added_cond_kwargs",
}
"""Configuration keys that make a model need an argument for which `forward` has a default."""


@dataclass(frozen=True)
class Layout:
    """Where channels stand among the axes of one sample."""

    channel_axis: int

    def shape(self, channels: int, size: Sequence[int]) -> tuple[int, ...]:
        """The shape of one sample."""
        return (*size[: self.channel_axis], channels, *size[self.channel_axis :])


@dataclass(frozen=True)
class Argument:
    """An argument of `forward`, and the graph inputs that it may stand for.

    Args:
        name: of the argument.
        choices: what it may be; several where the configuration leaves a choice, none where it is not understood.
    """

    name: str
    choices: tuple[ArrayInput | ClassInput, ...]


def family_of_class(kind: type[nn.Module], config: Mapping[str, Any], context: FamilyContext) -> Family:
    """The family of a class that quantempo does not know, as far as its signature and configuration tell.

    Args:
        kind: the class.
        config: its configuration.
        context: size of a sample, prompt length, labels.

    Raises:
        UnsupportedModel: they do not tell; the message lists the arguments.
    """
    name = kind.__name__
    parameters = {n: p for n, p in inspect.signature(kind.forward).parameters.items() if n != "self"}
    convention, whole = convention_of(kind), whole_config(kind, config)
    size = context.size or _configured_size(whole)
    request = _Request(name, config, whole, context, parameters, size, convention or Convention())
    if convention is None:
        raise request.refusal("no note of what diffusers' pipelines pass to it, such as a scaled timestep")
    found: list[Family] = []
    errors: list[str] = []
    with quiet(), torch.no_grad():
        module = _weightless(kind, request)
        for candidate in request.candidates():
            try:
                returned = _returned(module, candidate)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {first_line(error)}")
                continue
            fitted = _fitted(candidate, returned)
            if fitted is None:
                errors.append(f"forward returns {returned} for a sample of {(2, *candidate.sample_shape)}")
            elif fitted.sample_shape not in [f.sample_shape for f in found]:
                found.append(fitted)
    if len(found) == 1:
        return found[0]
    if found:
        raise request.refusal(f"several shapes of a sample with which it runs: {[f.sample_shape for f in found]}")
    raise request.refusal(f"a call that does not run ({errors[0] if errors else 'no shape of the sample is known'})")


def fitted_to_class(family: Family, kind: type[nn.Module], config: Mapping[str, Any]) -> Family:
    """A family whose call is known, with the channels that the class returns.

    Raises:
        UnsupportedModel: the prediction has not the sample's shape.
    """
    try:
        with quiet(), torch.no_grad():
            with torch.device("meta"):
                module = make(kind, config).eval()
            returned = _returned(module, family)
    except Exception as error:
        # Python that looks at contents cannot run without any; the comparison after the trace finds what is wrong.
        logger.info("%s: does not run without weights: %s", family.class_name, first_line(error))
        return family
    fitted = _fitted(family, returned)
    if fitted is None:
        raise UnsupportedModel(
            f"denoiser of class {family.class_name!r}", found=f"a prediction of shape {returned}",
            wanted=f"the sample's {(2, *family.sample_shape)}, or twice its channels",
            cause="another output is the prediction, or the sample is another argument",
            remedy="say which output it is with output_select in the file of --inputs (docs/models.md)",
        )
    return fitted


def _weightless(kind: type[nn.Module], request: _Request) -> nn.Module:
    try:
        with torch.device("meta"):
            return make(kind, request.given).eval()
    except Exception as error:
        raise request.refusal(f"a class that cannot be made from it ({first_line(error)})") from error


def _returned(module: nn.Module, family: Family) -> tuple[int, ...]:
    """The shape of what a weightless module returns for a batch of two."""
    feeds = {
        spec.name: torch.empty(
            [2 if isinstance(size, str) else size for size in spec.shape], dtype=getattr(torch, spec.dtype),
            device="meta",
        )
        for spec in family.inputs()
    }
    return tuple(map(int, family.prediction(module(**family.arguments(feeds)), feeds).shape))


def _fitted(family: Family, returned: tuple[int, ...]) -> Family | None:
    """The family with the channels that `forward` returns; `None` where they are not the sample's."""
    if returned == (2, *family.sample_shape):
        return family
    channels, *rest = family.sample_shape
    if returned == (2, 2 * channels, *rest):  # a predicted variance
        return dataclasses.replace(family, output_channels=2 * channels)
    return None


def _configured_size(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Frames, where a key counts latent ones, and height and width."""
    value = config.get("sample_size")
    frames = config.get("video_length") or config.get("num_frames")
    before = (int(frames),) if isinstance(frames, int) else ()
    if isinstance(value, int):
        return (*before, value, value)
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return (*before, *map(int, value))
    return None


@dataclass(frozen=True)
class _Request:
    """What is known of a class.

    Args:
        class_name: its name.
        given: its configuration.
        config: the same with the defaults of the class.
        context: what the user asked for.
        parameters: of `forward`.
        size: of a sample without its channels; `None` where nothing says it.
        convention: what stands between it and a sampler.
    """

    class_name: str
    given: Mapping[str, Any]
    config: Mapping[str, Any]
    context: FamilyContext
    parameters: Mapping[str, inspect.Parameter]
    size: tuple[int, ...] | None
    convention: Convention

    def candidates(self) -> Iterator[Family]:
        """Families to try."""
        sample, timestep = self.role(SAMPLE_ARGUMENTS), self.role(TIMESTEP_ARGUMENTS)
        arguments = [a for a in map(self.argument, self.parameters) if a is not None]
        if not sample or not timestep or any(not a.choices for a in arguments):
            missing = [a.name for a in arguments if not a.choices]
            raise self.refusal(
                f"arguments that have to be given and are not understood: {', '.join(missing)}" if missing
                else "no argument that is the noisy sample, or none that is the timestep"
            )
        if not self.size or not self.channels():
            raise self.refusal("no size" if self.channels() else "no number of channels")
        for shape, axis, condition in self.samples():
            for chosen in itertools.product(*(a.choices for a in arguments)):
                arrays = tuple(each for each in chosen if isinstance(each, ArrayInput))
                yield Family(
                    self.class_name, shape, _arguments(sample, timestep, self.convention.timestep(self.config), axis,
                                                       "return_dict" in self.parameters),
                    classes=tuple(each for each in chosen if isinstance(each, ClassInput)),
                    arrays=(*arrays, *condition),
                )

    def samples(self) -> Iterator[tuple[tuple[int, ...], int, tuple[ArrayInput, ...]]]:
        """Shapes of a sample, the axis of its channels, and what is joined to it there."""
        assert self.size is not None
        taken = self.channels()
        returned = self.number(RETURNED) or taken
        channels = min(taken, returned)
        for axis in range(len(self.size) + 1):
            shape = Layout(axis).shape(channels, self.size)
            more = Layout(axis).shape(taken - channels, self.size)
            yield shape, axis, () if channels == taken else (
                ArrayInput(SAMPLE_CONDITION, "float32", more, guided=False),
            )
        if len(self.size) == 2 and self.size[0] == self.size[1]:  # one number may be the length of a sequence
            yield (channels, self.size[0]), 0, ()

    def argument(self, name: str) -> Argument | None:
        """What one argument is; `None` where it is left out, or a role of its own."""
        if name in (self.role(SAMPLE_ARGUMENTS), self.role(TIMESTEP_ARGUMENTS), "return_dict"):
            return None
        parameter = self.parameters[name]
        if parameter.kind in VARIADIC or name in self.convention.unused:
            return None
        choices = self.choices(name)
        if choices or not self.needed(name):
            return Argument(name, choices) if choices else None
        return Argument(name, ())

    def needed(self, name: str) -> bool:
        """Whether `forward` has no default for an argument, or the configuration turns it on."""
        return self.parameters[name].default is inspect.Parameter.empty or any(
            self.config.get(key) for key, argument in TURNED_ON.items() if argument == name
        )

    def choices(self, name: str) -> tuple[ArrayInput | ClassInput, ...]:
        """The graph inputs that an argument may stand for."""
        if name in PROMPTS:
            widths = dict.fromkeys(w for key in PROMPT_WIDTHS for w in [self.config.get(key)] if isinstance(w, int))
            return tuple(ArrayInput(name, "float32", (self.tokens(), width)) for width in widths)
        if name in MASKS:
            return (ArrayInput(name, "int64", (self.tokens(),)),)
        if name in VECTORS:
            width = self.number(VECTORS[name])
            guided = name != "timestep_cond"
            return (ArrayInput(name, "float32", (width,), guided),) if width else ()
        if name == "guidance" and (self.config.get("guidance_embeds") or self.config.get("guidance_embed")):
            return (ArrayInput(name, "float32", (), guided=False),)
        if name in SIZES:
            return (ArrayInput(name, "float32", (2,), guided=False),)
        if name == "class_labels":
            for key, less in LABELS.items():
                if isinstance(self.config.get(key), int):
                    count = int(self.config[key]) + less
                    return (ClassInput(name, count, count, self.context.labels),)
        return ()

    def role(self, names: Sequence[str]) -> str:
        return next((name for name in names if name in self.parameters), "")

    def number(self, keys: Sequence[str]) -> int:
        return next((int(self.config[key]) for key in keys if isinstance(self.config.get(key), int)), 0)

    def channels(self) -> int:
        return self.number(CHANNELS)

    def tokens(self) -> int:
        return self.context.tokens or self.number(PROMPT_LENGTHS) or self.context.encoder_tokens or TOKENS

    def refusal(self, found: str) -> UnsupportedModel:
        """The error, with what is known of each argument."""
        listed = "; ".join(f"{name} {self.known(name)}" for name in self.parameters if self.listed(name))
        size = "" if self.size else "add --size, or "
        return UnsupportedModel(
            f"denoiser of class {self.class_name!r}", found=found,
            wanted=f"an example call that follows from signature and configuration: {listed}",
            cause="quantempo has no description of this class, and makes no inputs up",
            remedy=f"{size}give one example call with --inputs FILE.npz: an array for each of these arguments, as the "
            "model's pipeline passes it, with a batch of 2 (docs/models.md); in Python: family_of_example",
        )

    def listed(self, name: str) -> bool:
        roles = (self.role(SAMPLE_ARGUMENTS), self.role(TIMESTEP_ARGUMENTS))
        return name in roles or self.needed(name) or bool(self.choices(name))

    def known(self, name: str) -> str:
        """What is known of an argument's shape."""
        if name == self.role(SAMPLE_ARGUMENTS):
            size = " x ".join(map(str, self.size)) if self.size else "unknown size (--size)"
            return f"(2, axes of {self.channels() or 'unknown'} channels and {size})"
        if name == self.role(TIMESTEP_ARGUMENTS):
            return "(2,) float32"
        shapes = [(2, *choice.shape) if isinstance(choice, ArrayInput) else (2,) for choice in self.choices(name)]
        return " or ".join(map(str, shapes)) if shapes else "(shape unknown)"


def _arguments(
    sample: str, timestep: str, scaled: Callable[[torch.Tensor], torch.Tensor], channel_axis: int, dictionary: bool
) -> Callable[[Feeds], Mapping[str, Any]]:
    def arguments(feeds: Feeds) -> Mapping[str, Any]:
        found = {name: tensor for name, tensor in feeds.items() if name not in (SAMPLE, TIMESTEP, SAMPLE_CONDITION)}
        state = feeds[SAMPLE]
        if SAMPLE_CONDITION in feeds:
            state = torch.cat([state, feeds[SAMPLE_CONDITION]], dim=channel_axis + 1)
        found |= {sample: state, timestep: scaled(feeds[TIMESTEP])}
        return {**found, "return_dict": False} if dictionary else found

    return arguments
