"""Any upload becomes an upright RGB image, or is refused with a clear message and no other effect."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.conversation.conversation import CONV_VISION
from minigpt4.conversation.images import open_image
from minigpt4.processors import ImageError
from tests.golden import GOLDEN
from tests.small_release import picture

ORIENTATION = 0x0112  # the EXIF tag


def pixels(image):
    return np.asarray(open_image(image)).astype(int)


@pytest.mark.parametrize(
    "mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "YCbCr", "HSV", "I", "F", "PA", "I;16"]
)
def test_every_mode_becomes_rgb(mode):
    image = (
        picture(1).convert("L").convert("I;16")
        if mode == "I;16"
        else picture(1).convert("RGBA").convert(mode)
    )
    rgb = open_image(image)
    assert (rgb.mode, rgb.size) == ("RGB", image.size)
    # those keep few colours; measured: HSV is off by up to 5 levels
    if mode not in ("1", "P", "PA"):
        gray = (
            picture(1).convert("L").convert("RGB")
            if mode in ("L", "LA", "I", "F", "I;16")
            else picture(1)
        )
        assert np.abs(pixels(image) - pixels(gray)).max() <= 8


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    assert np.abs(pixels(tmp_path / "deep.png")[..., 0] - ramp / 257).max() <= 1


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    rgb = open_image(image)
    assert (rgb.getpixel((0, 0)), rgb.getpixel((3, 1))) == ((200, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_pictures_stand_upright(tmp_path, orientation):
    upright = picture(2)
    # the transpose that the camera applied, by PIL's numbers
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "photo.png"), np.asarray(upright))


def bomb(side):
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "text.png": (b"this is not an image", "cannot identify image file"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify image file"),
    "cut.png": (None, "OSError|SyntaxError|broken|truncated"),
    "bomb.png": (bomb(12000), "12000 x 12000 pixels; at most"),
    "empty.jpg": (b"", "cannot identify image file"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_refused_and_change_nothing(chat, tmp_path, name):
    content, message = BAD[name]
    if content is None:
        buffer = io.BytesIO()
        picture(3).save(buffer, "PNG")
        content = buffer.getvalue()[:-1500]
    (tmp_path / name).write_bytes(content)
    conv, images = CONV_VISION.copy(), []
    with pytest.raises(ImageError, match=message) as caught:
        chat.upload_img(str(tmp_path / name), conv, images)
    assert name in str(caught.value)
    assert (conv, images) == (CONV_VISION, [])


@pytest.mark.parametrize(
    "image", [7, None, b"\x89PNG", np.zeros((4, 4, 3))], ids=["int", "None", "bytes", "array"]
)
def test_other_types_are_refused(chat, image):
    conv, images = CONV_VISION.copy(), []
    with pytest.raises(
        ImageError, match="expected a path, a PIL or numpy image or a tensor of pixels"
    ):
        chat.upload_img(image, conv, images)
    with pytest.raises(FileNotFoundError, match=r"image: no file 'nowhere\.png'"):
        chat.upload_img("nowhere.png", conv, images)
    assert (conv, images) == (CONV_VISION, [])


def test_path_picture_and_pixels_give_one_embedding(chat):
    path = next((GOLDEN / "h_conversation/images").glob("*.png"))
    with Image.open(path) as image:
        processed = chat.vis_processor(image.convert("RGB"))
        forms = [str(path), path, image, processed, processed[None]]
        found = []
        for form in forms:
            conv, images = CONV_VISION.copy(), []
            assert chat.upload_img(form, conv, images) == "Received."
            found += images
    for embedding in found:
        assert torch.equal(embedding, found[0])
        assert not embedding.requires_grad
        assert embedding.ndim == 3 and len(embedding) == 1


def test_tensors_that_are_no_pixels_are_refused(chat):
    for tensor in (
        torch.zeros(4, 42, 42),
        torch.zeros(3, 42, 42, dtype=torch.uint8),
        torch.zeros(2, 3, 42, 42),
    ):
        with pytest.raises(ValueError, match=r"image: tensor .*; expected float \[3, S, S\]"):
            chat.upload_img(tensor, CONV_VISION.copy(), [])


def test_encoding_in_two_steps_is_the_same(chat):
    """The newest release uploads first and encodes later; here the upload encodes and the second call finds it done."""
    conv, images = CONV_VISION.copy(), []
    chat.upload_img(picture(1), conv, images)
    first = images[0]
    chat.encode_img(images)
    assert images[0] is first
    raw = [picture(1), first, picture(2)]
    chat.encode_img(raw)
    assert torch.equal(raw[0], first) and raw[1] is first and not torch.equal(raw[2], first)


def test_a_batch_of_images_equals_single_images(chat):
    pictures = [picture(seed) for seed in range(3)]
    together = chat.encode_images(pictures)
    for image, embedding in zip(pictures, together, strict=True):
        # float32 sums in another order; measured 5e-7
        torch.testing.assert_close(chat.encode_images([image])[0], embedding, atol=1e-5, rtol=0)
