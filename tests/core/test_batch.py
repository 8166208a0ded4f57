"""Batches: pictures to patches, rows to packed fields, and what is refused."""

from __future__ import annotations

import pytest
import torch

from core import check_batch, make_batch, patchify, stack_examples, vlm


def test_patchify_puts_each_pixel_where_its_place_says() -> None:
    size, merge, height, width = 3, 2, 12, 18
    image = torch.arange(3 * height * width).view(3, height, width)
    patches, places = patchify(image, size, merge)
    assert patches.shape == (24, 27)
    assert sorted(map(tuple, places.tolist())) == [(r, c) for r in range(4) for c in range(6)]
    for patch, (row, col) in zip(patches, places.tolist(), strict=True):
        cut = image[:, row * size : (row + 1) * size, col * size : (col + 1) * size]
        assert torch.equal(patch, cut.flatten())


def test_patchify_goes_cell_by_cell() -> None:
    _, places = patchify(torch.zeros(3, 4, 6), 1, 2)
    cells = places.view(6, 4, 2)
    assert cells[0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert (cells[:, 0] // 2).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("shape", [(3, 9, 8), (3, 8, 12), (1, 8, 8), (3, 0, 8)])
def test_patchify_refuses_what_does_not_divide(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8 \(patch_size 4 x merge 2\).*resize"):
        patchify(torch.zeros(shape), 4, 2)


def test_rows_become_documents() -> None:
    batch = make_batch(torch.tensor([[5, 6, 7], [8, 1, 5]]), image_token=1, seed=9)
    assert batch["tokens"].tolist() == [5, 6, 7, 8, 1, 5]
    assert batch["labels"].tolist() == [6, 7, -100, -100, 5, -100]  # no label is a placeholder
    assert batch["positions"].tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["cu_seqlens"].tolist() == [0, 3, 6]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["seed"].shape == ()
    assert batch["seed"].item() == 9
    assert "patches" not in batch


def test_given_labels_are_taken_as_they_are() -> None:
    labels = torch.tensor([[-100, 3], [4, -100]])
    assert make_batch(torch.zeros(2, 2, dtype=torch.int64), labels)["labels"].tolist() == [
        -100,
        3,
        4,
        -100,
    ]


def test_pictures_take_their_placeholders_in_order(micro) -> None:
    config = micro["mlp"]
    tokens = torch.full((2, 9), 5)
    tokens[0, 1:5] = 1  # 16 x 16: 4 image tokens
    tokens[1, 3:5] = 1  # 8 x 16: 2
    images = [torch.full((3, 16, 16), 10), torch.full((3, 8, 16), 20)]
    batch = make_batch(tokens, config=config, images=images, image_token=1)
    check_batch(batch, config)
    assert batch["image_slots"].tolist() == [1, 2, 3, 4, 12, 13]
    assert batch["image_cu_seqlens"].tolist() == [0, 16, 24]
    assert batch["image_cu_seqlens"].dtype == torch.int32
    assert batch["patches"][:16].unique().tolist() == [10]
    assert batch["patches"][16:].unique().tolist() == [20]
    assert batch["patch_positions"][16:].amax(0).tolist() == [1, 3]


def test_pictures_must_match_their_placeholders(micro) -> None:
    tokens = torch.full((1, 9), 5)
    tokens[0, :3] = 1
    picture = torch.zeros(3, 16, 16)
    with pytest.raises(
        ValueError, match=r"1 pictures take 4 image tokens, .* 3 placeholders \(1\)"
    ):
        make_batch(tokens, config=micro["mlp"], images=[picture], image_token=1)
    for config, token in ((None, 1), (micro["text"], 1), (micro["mlp"], None)):
        with pytest.raises(ValueError, match="pictures need a config with a vision tower"):
            make_batch(tokens, config=config, images=[picture], image_token=token)


def test_stack_examples_adds_one_axis(micro, example) -> None:
    config = micro["mlp"]
    examples = [example(config, rows=1, seed=seed) for seed in range(3)]
    stacked = stack_examples(examples)
    assert stacked.keys() == examples[0].keys()
    for name, tensor in stacked.items():
        assert all(torch.equal(tensor[i], examples[i][name]) for i in range(3)), name


def test_stack_examples_names_what_differs(micro, example) -> None:
    one = example(micro["mlp"], rows=1)
    text = {k: v for k, v in one.items() if k != "patches"}
    with pytest.raises(
        ValueError, match=r"example 1 and example 0 differ in fields: \['patches'\]"
    ):
        stack_examples([one, text])
    longer = one | {"image_slots": one["image_slots"][:2]}
    with pytest.raises(
        ValueError, match=r"image_slots is \[2\] in example 1 but \[4\] in example 0"
    ):
        stack_examples([one, longer])


def test_check_batch_accepts_what_make_batch_makes(micro, example) -> None:
    for config in micro.values():
        check_batch(example(config), config)


def put(index: int, value: int):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("tokens", put(3, 61), "tokens holds 61, outside the vocabulary of 61"),
        ("tokens", put(3, -100), "tokens holds -100"),
        ("labels", put(3, 61), "labels holds 61"),
        ("labels", put(3, -1), "labels holds -1"),
        ("cu_seqlens", put(0, 1), "cu_seqlens must rise from 0 to 24"),
        ("cu_seqlens", put(-1, 23), "cu_seqlens must rise from 0 to 24"),
        ("cu_seqlens", put(1, 99), "cu_seqlens must rise from 0 to 24"),
        ("cu_seqlens", torch.Tensor.long, "cu_seqlens must be int32, not torch.int64"),
        ("image_cu_seqlens", put(-1, 31), "image_cu_seqlens must rise from 0 to 32"),
        ("image_slots", put(0, 25), "image_slots holds a place outside the 24 tokens"),
        ("image_slots", put(0, -1), "image_slots holds a place outside the 24 tokens"),
        ("patches", lambda t: t[:, 1:], "patches are 47 wide, not 48"),
    ],
)
def test_check_batch_names_the_field(micro, example, field: str, change, message: str) -> None:
    batch = example(micro["mlp"])
    with pytest.raises(ValueError, match=message):
        check_batch(batch | {field: change(batch[field])}, micro["mlp"])


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1, 2, 3, 12, 13, 14, 24], "leaves out a part of picture 1"),
        ([0, 1, 2, 24, 12, 13, 14, 15], "leaves out a part of picture 0"),
        ([0, 1, 2, 12, 13, 14, 15, 16], "puts two documents' tokens into picture 0"),
        ([0, 1, 2, 3, 4, 12, 13, 14], "puts two documents' tokens into picture 1"),
        ([12, 13, 14, 15, 0, 1, 2, 3], "image_slots must rise"),
        ([0, 1, 2, 3, 24, 24, 24, 24], None),  # an unused picture
        ([0, 1, 2, 3, 4, 5, 6, 7], None),  # both in one document
    ],
)
def test_slots_are_counted_against_the_pictures_of_each_document(
    micro, example, slots: list[int], message: str | None
) -> None:
    config = micro["mlp"]
    batch = example(config) | {"cu_seqlens": torch.tensor([0, 12, 24], dtype=torch.int32)}
    assert batch["image_cu_seqlens"].tolist() == [0, 16, 32]
    batch["image_slots"] = torch.tensor(slots)
    if message is None:
        check_batch(batch, config)
    else:
        with pytest.raises(ValueError, match=message):
            check_batch(batch, config)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("labels", "lacks 'labels'"),
        ("cu_seqlens", "lacks 'cu_seqlens'"),
        ("image_slots", r"lacks \['image_slots'\]"),
    ],
)
def test_check_batch_names_a_missing_field(micro, example, field: str, message: str) -> None:
    batch = example(micro["mlp"])
    del batch[field]
    with pytest.raises(ValueError, match=message):
        check_batch(batch, micro["mlp"])


def test_pictures_without_a_vision_tower_are_refused(micro, example, rough) -> None:
    batch, blind = example(micro["mlp"]), micro["text"]
    with pytest.raises(ValueError, match="no vision tower"):
        check_batch(batch, blind)
    with pytest.raises(ValueError, match="drop the image fields, or choose a config with vision"):
        vlm(blind)(rough(blind), batch)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("positions", lambda t: t[1:], r"positions is \[23\], not \[24\]"),
        ("labels", lambda t: t[1:], r"labels is \[23\], not \[24\]"),
        ("patch_positions", lambda t: t[1:], r"patch_positions is \[31, 2\], not \[32, 2\]"),
        ("image_slots", lambda t: t[1:], r"image_slots is \[7\], not \[8\]"),
        ("image_slots", torch.zeros_like, "image_slots gives one token to two"),
    ],
)
def test_check_batch_compares_lengths(micro, example, field: str, change, message: str) -> None:
    batch = example(micro["mlp"])
    with pytest.raises(ValueError, match=message):
        check_batch(batch | {field: change(batch[field])}, micro["mlp"])


def test_a_text_only_batch_is_fine_with_eyes(micro, example) -> None:
    check_batch(example(micro["text"]), micro["mlp"])
