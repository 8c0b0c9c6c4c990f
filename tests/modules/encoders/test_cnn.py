from __future__ import annotations

import pytest
import torch
from torch import nn

from matwm_rl.modules import CNNDecoder, CNNEncoder


def test_cnn_reads_uint8_as_numbers_from_0_to_1() -> None:
    encoder = CNNEncoder((3, 32, 32), 6, channels=4)
    image = torch.randint(256, (2, 5, 3, 32, 32), dtype=torch.uint8)
    out = encoder(image)
    assert out.shape == (2, 5, 6)
    torch.testing.assert_close(out, encoder(image.float() / 255))


def test_cnn_ties_no_images_to_each_other() -> None:
    encoder = CNNEncoder((1, 16, 16), 6, channels=4)
    image = torch.rand(2, 3, 1, 16, 16)
    alone = torch.stack([encoder(image[n : n + 1, b : b + 1])[0, 0] for n in range(2) for b in range(3)])
    torch.testing.assert_close(encoder(image).flatten(0, 1), alone, rtol=1e-4, atol=1e-5)


def test_cnn_decoder_mirrors_the_encoder() -> None:
    decoder = CNNDecoder(6, (3, 32, 32), channels=4)
    assert decoder(torch.randn(2, 5, 4, 6)).shape == (2, 5, 4, 3, 32, 32)
    kernels = [m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.kernel_size, m.stride) for m in kernels] == [((4, 4), (2, 2))] * 4


@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 32, 64), (32, 32)])
@pytest.mark.parametrize("make", [lambda s: CNNEncoder(s, 6), lambda s: CNNDecoder(6, s)])
def test_unfit_images_are_refused(shape: tuple[int, ...], make: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="image_size"):
        make(shape)
