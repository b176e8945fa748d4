"""Train the demo models on scikit-learn's digits: VAE, DiT, UNet and judge.

    python tools/train_demo.py vae judge dit unet --work build/train
    python tools/train_demo.py export --work build/train

Each model trains on its own (`vae` before `dit`), is seeded, and resumes from its last checkpoint:
the batch of step `k` depends on (seed, k) alone, so an interrupted run continues to the same weights
(on the same machine and thread count).  `export` writes the committed float16 files.

Data: 1797 grey digits of 8×8 pixels, enlarged to 32×32, each in 16 slightly rotated and shifted copies.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
DIT_DIR = ROOT / "quantempo" / "demo" / "dit"
JUDGE_FILE = ROOT / "quantempo" / "demo" / "judge.onnx"
UNET_DIR = ROOT / "tests" / "models" / "unet"
SEED = 20260
COPIES = 16
DIT_NULL_CLASS = 1000
UNET_NULL_CLASS = 10
LATENT_SIZE = 16

VAE_CONFIG = dict(
    in_channels=1,
    out_channels=1,
    latent_channels=4,
    block_out_channels=(16, 32),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=32,
)
DIT_CONFIG = dict(
    num_attention_heads=4,
    attention_head_dim=32,
    num_layers=6,
    in_channels=4,
    out_channels=8,
    sample_size=LATENT_SIZE,
    patch_size=2,
    num_embeds_ada_norm=1000,
)
UNET_CONFIG = dict(
    sample_size=16,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(48, 64, 96),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=32,
    norm_num_groups=16,
    num_class_embeds=11,
)
# The scheduler settings of the published DiT checkpoints.
SCHEDULER_CONFIG = dict(
    num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True, steps_offset=0
)


class Judge(nn.Module):
    """A small digit classifier; input (batch, 1, 16, 16) in [0, 1]; returns logits and 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.head(features), features


def digits(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 1, size, size) in [-1, 1] and labels (count,), `COPIES` warped copies of each digit."""
    raw, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(SEED)
    images = []
    for flat in raw:
        big = np.clip(ndimage.zoom(np.pad(flat.reshape(8, 8) / 16.0, 1), 3.2, order=3), 0, 1)
        for copy in range(COPIES):
            angle, shift = (0.0, (0.0, 0.0)) if copy == 0 else (rng.uniform(-8, 8), rng.uniform(-1.5, 1.5, 2))
            warped = ndimage.shift(ndimage.rotate(big, angle, reshape=False, order=1), shift, order=1)
            images.append(np.clip(warped, 0, 1).astype(np.float32))
    tensor = torch.from_numpy(np.stack(images))[:, None] * 2 - 1
    if size != tensor.shape[-1]:
        tensor = F.avg_pool2d(tensor, tensor.shape[-1] // size)
    return tensor, torch.from_numpy(np.repeat(labels, COPIES))


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Trainer:
    """AdamW with warm-up, cosine decay and an exponential moving average; checkpoints are safetensors."""

    def __init__(self, model: nn.Module, folder: Path, steps: int, learning_rate: float, ema_decay: float = 0.999):
        self.model, self.folder, self.steps, self.learning_rate = model, folder, steps, learning_rate
        self.ema_decay = ema_decay
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.state = {
            kind: {name: torch.zeros_like(p) for name, p in self.params.items()} for kind in ("mean", "square")
        }
        self.state["ema"] = {name: p.detach().clone() for name, p in self.params.items()}
        self.step = 0
        self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        stored = load_file(self.checkpoint)
        self.step = int(stored.pop("step"))
        with torch.no_grad():
            for key, value in stored.items():
                kind, name = key.split("|", 1)
                target = self.params[name] if kind == "param" else self.state[kind][name]
                target.copy_(value)
        print(f"{self.folder.name}: resumed at step {self.step}", flush=True)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"param|{name}": p.detach().contiguous() for name, p in self.params.items()}
        for kind, values in self.state.items():
            tensors |= {f"{kind}|{name}": v.contiguous() for name, v in values.items()}
        tensors["step"] = torch.tensor(self.step)
        temporary = self.checkpoint.with_suffix(".tmp")
        save_file(tensors, temporary)
        temporary.replace(self.checkpoint)

    def rate(self) -> float:
        warm = min(1.0, (self.step + 1) / 200)
        return self.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        beta1, beta2 = 0.9, 0.99
        names = list(self.params)
        params: list[torch.Tensor] = [self.params[n] for n in names]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        mean, square, ema = ([self.state[k][n] for n in names] for k in ("mean", "square", "ema"))
        with torch.no_grad():
            torch._foreach_lerp_(mean, grads, 1 - beta1)
            torch._foreach_mul_(square, beta2)
            torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
            scale = math.sqrt(1 - beta2 ** (self.step + 1)) / (1 - beta1 ** (self.step + 1))
            denominator = torch._foreach_sqrt(square)
            torch._foreach_add_(denominator, 1e-8)
            rate = self.rate()
            torch._foreach_mul_(params, 1 - rate * 0.01)
            torch._foreach_addcdiv_(params, mean, denominator, -rate * scale)
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(ema, params, 1 - decay)
        for p in params:
            p.grad = None

    def run(self, loss_at: Callable[[int], torch.Tensor]) -> None:
        started, first, losses = time.time(), self.step, []
        while self.step < self.steps:
            loss = loss_at(self.step)
            torch.autograd.backward(loss)
            self.update()
            self.step += 1
            losses.append(float(loss.detach()))
            if self.step % 100 == 0 or self.step == self.steps:
                pace = (time.time() - started) / (self.step - first)
                left = pace * (self.steps - self.step) / 60
                print(f"{self.folder.name} step {self.step}/{self.steps} loss {np.mean(losses[-100:]):.4f} "
                      f"{pace * 1e3:.0f} ms/step, {left:.1f} min left", flush=True)
            if self.step % 200 == 0 or self.step == self.steps:
                self.save()
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(self.state["ema"][name])


def forward_process(x0: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy samples, noise and timesteps (DDPM, Ho et al. 2020, equation 4)."""
    timesteps = torch.randint(0, 1000, (x0.shape[0],), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    return DDIMScheduler(**SCHEDULER_CONFIG).add_noise(x0, noise, timesteps), noise, timesteps


def train_vae(work: Path, steps: int) -> AutoencoderKL:
    torch.manual_seed(SEED)
    vae = AutoencoderKL(**VAE_CONFIG)
    images, _ = digits()

    def loss_at(step: int) -> torch.Tensor:
        generator = step_generator(1, step)
        batch = images[torch.randint(0, len(images), (32,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        loss: torch.Tensor = F.mse_loss(decoded, batch) + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel() * 4
        return loss

    Trainer(vae, work / "vae", steps, 2e-3).run(loss_at)
    with torch.no_grad():
        latents = vae.encode(images[:: COPIES]).latent_dist.mean
        vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
        error = F.mse_loss(vae.decode(latents).sample, images[:: COPIES])
    print(f"vae: psnr {10 * math.log10(4 / float(error)):.1f} dB, scaling_factor {vae.config.scaling_factor}")
    vae.save_pretrained(work / "vae" / "model")
    return vae


def train_judge(work: Path, steps: int) -> Judge:
    torch.manual_seed(SEED)
    judge = Judge()
    images, labels = digits(16)
    images = (images + 1) / 2
    held_out = torch.arange(len(images)) // COPIES % 6 == 5

    def loss_at(step: int) -> torch.Tensor:
        generator = step_generator(2, step)
        chosen = torch.nonzero(~held_out)[:, 0]
        chosen = chosen[torch.randint(0, len(chosen), (128,), generator=generator)]
        batch = images[chosen] + 0.05 * torch.randn(images[chosen].shape, generator=generator)
        return F.cross_entropy(judge(batch)[0], labels[chosen])

    Trainer(judge, work / "judge", steps, 2e-3).run(loss_at)
    with torch.no_grad():
        accuracy = (judge(images[held_out])[0].argmax(1) == labels[held_out]).float().mean()
    print(f"judge: accuracy on held-out digits {100 * accuracy:.2f} %")
    save_file(judge.state_dict(), work / "judge" / "model.safetensors")
    return judge


def train_dit(work: Path, steps: int) -> DiTTransformer2DModel:
    vae = AutoencoderKL.from_pretrained(work / "vae" / "model").eval()
    images, labels = digits()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(images, 512)])
    latents = latents * vae.config.scaling_factor
    torch.manual_seed(SEED + 1)
    dit = DiTTransformer2DModel(**DIT_CONFIG)
    # adaLN-Zero (DiT, section 3.2), which diffusers leaves to the trainer.
    for name, p in dit.named_parameters():
        if name.endswith(("norm1.linear.weight", "norm1.linear.bias")) or name.startswith(("proj_out_2",)):
            nn.init.zeros_(p)
    dit.train()

    def loss_at(step: int) -> torch.Tensor:
        generator = step_generator(3, step)
        chosen = torch.randint(0, len(latents), (64,), generator=generator)
        noisy, noise, timesteps = forward_process(latents[chosen], generator)
        dropped = torch.rand(len(chosen), generator=generator) < 0.1
        classes = torch.where(dropped, DIT_NULL_CLASS, labels[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            out = dit(noisy, timestep=timesteps, class_labels=classes).sample
        return F.mse_loss(out[:, :4].float(), noise)

    disable_label_dropout(dit)
    Trainer(dit, work / "dit", steps, 1e-3).run(loss_at)
    save_file({k: v.contiguous() for k, v in dit.state_dict().items()}, work / "dit" / "model.safetensors")
    return dit


def disable_label_dropout(dit: DiTTransformer2DModel) -> None:
    """Labels are dropped once per sample by `loss_at`, not once per block by each block's own embedder."""
    for module in dit.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0


def train_unet(work: Path, steps: int) -> UNet2DModel:
    images, labels = digits(16)
    torch.manual_seed(SEED + 2)
    unet = UNet2DModel(**UNET_CONFIG)
    unet.train()

    def loss_at(step: int) -> torch.Tensor:
        generator = step_generator(4, step)
        chosen = torch.randint(0, len(images), (64,), generator=generator)
        noisy, noise, timesteps = forward_process(images[chosen], generator)
        dropped = torch.rand(len(chosen), generator=generator) < 0.1
        classes = torch.where(dropped, UNET_NULL_CLASS, labels[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(noisy, timesteps, class_labels=classes).sample
        return F.mse_loss(out.float(), noise)

    Trainer(unet, work / "unet", steps, 1e-3).run(loss_at)
    save_file({k: v.contiguous() for k, v in unet.state_dict().items()}, work / "unet" / "model.safetensors")
    return unet


def export(work: Path) -> None:
    """Write the committed float16 directories and the judge's ONNX file."""
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    dit = DiTTransformer2DModel(**DIT_CONFIG)
    dit.load_state_dict(load_file(work / "dit" / "model.safetensors"))
    vae = AutoencoderKL.from_pretrained(work / "vae" / "model")
    vae.register_to_config(_name_or_path="")  # the model's folder on this machine is nobody's business
    DiTPipeline(dit.half(), vae.half(), scheduler).save_pretrained(DIT_DIR)
    # The published DiT pipelines carry their label names in the index; `save_pretrained` leaves them out.
    index = json.loads((DIT_DIR / "model_index.json").read_text())
    index["id2label"] = {str(digit): str(digit) for digit in range(10)}
    (DIT_DIR / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    unet = UNet2DModel(**UNET_CONFIG)
    unet.load_state_dict(load_file(work / "unet" / "model.safetensors"))
    unet.half().save_pretrained(UNET_DIR / "unet")
    scheduler.save_pretrained(UNET_DIR / "scheduler")
    judge = Judge().eval()
    judge.load_state_dict(load_file(work / "judge" / "model.safetensors"))
    program = torch.onnx.export(
        judge, (torch.zeros(2, 1, 16, 16),), dynamo=True, opset_version=21, input_names=["images"],
        output_names=["logits", "features"], dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()
    program.save(str(JUDGE_FILE), external_data=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["vae", "judge", "dit", "unet", "export"])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "train")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="training steps (default: vae 1500, judge 1200, dit 6000, unet 4000)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainers = {
        "vae": (train_vae, 1500),
        "judge": (train_judge, 1200),
        "dit": (train_dit, 6000),
        "unet": (train_unet, 4000),
    }
    for what in args.what:
        if what == "export":
            export(args.work)
        else:
            train, steps = trainers[what]
            train(args.work, args.steps or steps)


if __name__ == "__main__":
    main()
