"""How large some differences are that the method files mention, on a folder of photographs.

  python docs/differences.py DIR

HOG: targets of crops resized without antialiasing (as OpenCV does) against targets with it.
dVAE: token ids in bf16 against those in float32, with random weights of the released sizes.
CAPI: the loss with Sinkhorn-Knopp outside log space against ours.
"""

import random
import sys
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capi import ClusterHead, cross_entropy, sinkhorn
from common import IMAGENET_MEAN, IMAGENET_STD, crop_boxes, find_images
from semantic_mim import RECIPES, Tokenizer, hog_target

BICUBIC = InterpolationMode.BICUBIC


class RandomTokenizer(Tokenizer):
    """Random weights of the released sizes. On the first images it sees, every convolution's output
    has mean 0 and variance 1, also that of a block's last one after its division by 64."""

    def __init__(self, images, width=256):
        sizes = {"input": (3, width, 7), "output.conv": (8 * width, 8192, 1)}
        before = width
        for group, after in enumerate((width, 2 * width, 4 * width, 8 * width), 1):
            for block in (1, 2):
                name = f"group_{group}.block_{block}"
                if before != after:
                    sizes[f"{name}.id_path"] = before, after, 1
                sizes[f"{name}.res_path.conv_1"] = before, after // 4, 3
                sizes[f"{name}.res_path.conv_2"] = after // 4, after // 4, 3
                sizes[f"{name}.res_path.conv_3"] = after // 4, after // 4, 3
                sizes[f"{name}.res_path.conv_4"] = after // 4, after, 1
                before = after
        self.weights = {}
        for name, (fan_in, fan_out, side) in sizes.items():
            self.weights[f"blocks.{name}.w"] = torch.randn(fan_out, fan_in, side, side)
            self.weights[f"blocks.{name}.b"] = torch.zeros(fan_out)
        self.calibrating = True
        self(images, (14, 14))
        self.calibrating = False

    def conv(self, x, name):
        out = super().conv(x, name)
        if self.calibrating:
            std, centre = torch.std_mean(out, (0, 2, 3))
            std = std / 64 if name.endswith("conv_4") else std
            self.weights[f"blocks.{name}.w"] /= std[:, None, None, None]
            self.weights[f"blocks.{name}.b"] -= centre / std
            out = super().conv(x, name)
        return out


def plain_sinkhorn(logits, temperature=0.06, iterations=3, eps=1e-8):
    logits = logits.float() / temperature
    x = (logits - logits.amax(0)).exp()
    for _ in range(iterations):
        x = x / (x.sum(0) + eps)
        x = x / (x.sum(-1, keepdim=True) + eps)
    return x


@torch.no_grad()
def main():
    torch.manual_seed(0)
    paths, _ = find_images(sys.argv[1], 3)
    paths = random.Random(0).sample(paths, min(500, len(paths)))
    photographs, hog = [], []
    for path in paths:
        with Image.open(path.decode()) as image:
            image = tf.pil_to_tensor(image.convert("RGB"))
        boxes, _ = crop_boxes(torch.rand(1, 41), *image.shape[1:], RECIPES["hog"]["crop_scale"])
        box = boxes[0].int().tolist()
        crops = [tf.resized_crop(image, *box, [224, 224], BICUBIC, antialias=antialias) / 255
                 for antialias in (True, False)]
        photographs.append(crops[0])
        crops = [tf.normalize(crop, IMAGENET_MEAN, IMAGENET_STD) for crop in crops]
        smooth, plain = hog_target(torch.stack(crops), 16)
        hog.append(((smooth - plain).norm() / plain.norm()).item())
    print(f"HOG targets of {len(paths)} photographs: relative L2 difference {mean(hog):.1%}")

    photographs = torch.stack(photographs)
    tokenizer = RandomTokenizer(photographs[:16])
    changed = []
    for images in photographs.split(16):
        ids = tokenizer(images, (14, 14))
        with torch.autocast("cpu", torch.bfloat16):
            changed.append((tokenizer(images, (14, 14)) != ids).float().mean().item())
    print(f"dVAE token ids that bf16 changes: {mean(changed):.0%}")

    logits = ClusterHead(96, 256)(torch.randn(256, 16, 96))  # [B, N, K]
    ours, plain = (cross_entropy(logits, rule(logits)) for rule in (sinkhorn, plain_sinkhorn))
    print(f"CAPI's loss outside log space: {((plain - ours) / ours).item():+.1e} of itself")


if __name__ == "__main__":
    main()
