"""Which example pulls hardest on the weights? One `vmap` of one `grad`, checkpointing and all.

Six pictures of one colour, each followed by its word; one has the wrong word. The model first
learns the right words, then gives a gradient per example of the batch.

Run: python docs/examples/per_example_gradients.py
Prints six norms, one of about 20 and five below 0.2, and `outlier: example 4`.
"""

import torch
from torch import Tensor
from torch.func import grad, vmap

from core import Forward, make_batch, preset, stack_examples, vlm
from core.batch import Batch
from params import init_params
from params.tree import Tree, flatten, map_leaves
from transforms import checkpoint, fuse_loss, value_and_grad

IMAGE = 1  # the placeholder's token
WRONG = 4  # the example with the wrong word


def make_examples() -> list[Batch]:
    """Each a red, green or blue picture, then three times its word: token 100, 101 or 102."""
    config = preset("tiny")
    assert config.vision is not None
    side = config.vision.image_size
    examples = []
    for i in range(6):
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        image[i % 3] = 255
        word = 100 + (i + (i == WRONG)) % 3
        places = [IMAGE] * config.image_tokens(config.vision.grid**2)
        tokens = torch.tensor([[*places, word, word, word]])
        examples.append(make_batch(tokens, config=config, images=[image], image_token=IMAGE))
    return examples


def train(loss_fn: Forward, params: Tree, examples: list[Batch]) -> Tree:
    """Plain gradient descent, ten times through the examples."""
    for example in examples * 10:
        _, grads = value_and_grad(loss_fn)(params, example)
        params = map_leaves(lambda p, g: p - 0.05 * g, params, grads)
    return params


def gradient_norms(loss_fn: Forward, params: Tree, examples: list[Batch]) -> Tensor:
    """The norm of each example's gradient over all leaves, [E]."""
    per_example = vmap(grad(loss_fn), in_dims=(None, 0))(params, stack_examples(examples))
    of_leaves = [g.flatten(1).norm(dim=1) for g in flatten(per_example).values()]
    return torch.stack(of_leaves).norm(dim=0)


def main() -> Tensor:
    config = preset("tiny")
    loss_fn = fuse_loss(checkpoint(vlm(config)))
    examples = make_examples()
    params = train(loss_fn, init_params(config, seed=0), examples[:3])
    norms = gradient_norms(loss_fn, params, examples)
    for i, norm in enumerate(norms.tolist()):
        print(f"example {i}: gradient norm {norm:.3f}")
    print(f"outlier: example {int(norms.argmax())}")
    return norms


if __name__ == "__main__":
    main()
