"""Makes the sample checkpoints in this folder: `make samples`, or `python make_samples.py [FOLDER]`.

The digits classifiers are really trained (seconds each, one thread, fixed seed) and must reach 98 % on the held-out
images, else no file of them is written. On one machine, with one version of torch, the files come
out the same byte for byte each time.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from repfuse.samples import DigitsMobileOne, DigitsRepVGG, NotebookBlock

SEED = 0
EPOCHS = 40
BATCH = 64
REQUIRED_ACCURACY = 0.98


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train, held_out = digits()
    torch.manual_seed(SEED)
    torch.save(notebook_block(), folder / "notebook_block.pt")
    write_digits(folder, train, held_out)
    torch.save(trained(DigitsMobileOne, train, held_out)[0], folder / "mobileone_digits.pt")


Split = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Split, Split]:
    """Return (images [N, 1, 8, 8] in 0..1, labels [N]) of the training and of the held-out fifth."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, held_out = train_test_split(range(len(labels)), test_size=0.2, random_state=SEED, stratify=data.target)
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def notebook_block() -> NotebookBlock:
    """Return the block with weights as large as trained ones (torch's fresh biases are nearly zero)."""
    block = NotebookBlock().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block


def write_digits(folder: Path, train: Split, held_out: Split) -> None:
    """Train the classifier and write it in every layout that the loader is asked to read."""
    model, optimizer, accuracy = trained(DigitsRepVGG, train, held_out)
    state = model.state_dict()
    torch.save(model, folder / "repvgg_digits.pt")
    torch.save(state, folder / "repvgg_digits_state_dict.pth")
    training = {"epoch": EPOCHS, "model": state, "optimizer": optimizer.state_dict(), "accuracy": accuracy}
    torch.save(training, folder / "repvgg_digits_training.pt")
    save_file(copy.deepcopy(state), folder / "repvgg_digits.safetensors")
    save_file({"inputs": held_out[0], "labels": held_out[1]}, folder / "digits_heldout.safetensors")


def trained(kind: type[nn.Module], train: Split, held_out: Split) -> tuple[nn.Module, torch.optim.Optimizer, float]:
    """Return a trained classifier of this class, its optimizer, and its share of right answers; or end the script."""
    torch.manual_seed(SEED)
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    fit(model, optimizer, *train)
    accuracy = score(model, *held_out)
    print(f"accuracy of {kind.__name__} on the {len(held_out[1])} held-out digits: {accuracy:.4f}")
    if accuracy < REQUIRED_ACCURACY:
        sys.exit(f"That is less than {REQUIRED_ACCURACY}: nothing of it was written.")
    return model, optimizer, accuracy


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Train with shifted copies of the images (by up to one pixel) and a cosine schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            loss = F.cross_entropy(model.train()(shifted(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Move each batch by -1, 0 or 1 pixel along both axes, filling with background."""
    down, right = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[..., down : down + 8, right : right + 8]


def score(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of right answers, and leave the model in eval mode."""
    with torch.inference_mode():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
