from unziplora.base import Base


def test_folder_is_opened_frozen(shared_base: Base):
    assert shared_base.name == "tiny-xl"
    assert (shared_base.resolution, shared_base.prediction_type) == (64, "epsilon")
    for part in [shared_base.unet, shared_base.vae, *shared_base.text_encoders]:
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_tiny_bases_share_no_unet(fresh_base, shared_base: Base):
    one, other = fresh_base(), fresh_base()
    assert len({id(base.unet) for base in (one, other, shared_base)}) == 3
    assert one.vae is shared_base.vae
