"""The transformer and hybrid families of timm, each with its smallest member that classifies.

``test_*`` models, of a size for timm's own tests, do not count as members. Families whose smallest member has no classifier get
one of 1,000 classes; those made for larger images than their position embeddings need are built for 224 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgevit.errors import UnknownName


@dataclass(frozen=True)
class Family:
    """``name`` for people and commands, ``member`` of timm, what it is (``transformer`` or ``hybrid``), the Python module of
    timm it is defined in, and what its constructor is given besides (0: as the member has it)."""

    name: str
    member: str
    kind: str
    module: str
    classes: int = 0
    img_size: int = 0


def _transformer(name: str, member: str, module: str, classes: int = 0, img_size: int = 0) -> Family:
    return Family(name, member, "transformer", module, classes, img_size)


def _hybrid(name: str, member: str, module: str) -> Family:
    return Family(name, member, "hybrid", module)


FAMILIES: tuple[Family, ...] = (
    _transformer("vit", "vit_tiny_patch16_224", "vision_transformer"),
    _transformer("deit", "deit_tiny_patch16_224", "deit"),
    _transformer("deit-distilled", "deit_tiny_distilled_patch16_224", "deit"),
    _transformer("deit3", "deit3_small_patch16_224", "deit"),
    _transformer("flexivit", "flexivit_small", "vision_transformer"),
    _transformer("dinov2", "vit_small_patch14_reg4_dinov2", "vision_transformer", 1000, 224),
    _transformer("siglip", "vit_base_patch16_siglip_224", "vision_transformer", 1000),
    _transformer("vit-rms", "vit_dwee_patch16_reg1_gap_256", "vision_transformer"),
    _transformer("vit-relpos", "vit_relpos_small_patch16_rpn_224", "vision_transformer_relpos"),
    _transformer("vit-srelpos", "vit_srelpos_small_patch16_224", "vision_transformer_relpos"),
    _transformer("vit-sam", "samvit_base_patch16_224", "vision_transformer_sam"),
    _transformer("naflexvit", "naflexvit_base_patch16_gap", "naflexvit", 0, 224),
    _transformer("beit", "beit_base_patch16_224", "beit"),
    _transformer("eva02", "eva02_tiny_patch14_224", "eva", 1000),
    _transformer("dinov3", "vit_tiny_patch16_dinov3_qkvb", "eva", 1000),
    _transformer("vit-rope", "vit_small_patch16_rope_224", "eva"),
    _transformer("perception-encoder", "vit_pe_core_tiny_patch16_384", "eva"),
    _transformer("cait", "cait_xxs24_224", "cait"),
    _transformer("xcit", "xcit_nano_12_p16_224", "xcit"),
    _transformer("crossvit", "crossvit_tiny_240", "crossvit"),
    _transformer("tnt", "tnt_s_legacy_patch16_224", "tnt"),
    _transformer("volo", "volo_d1_224", "volo"),
    _transformer("pit", "pit_ti_224", "pit"),
    _transformer("swin", "swin_tiny_patch4_window7_224", "swin_transformer"),
    _transformer("swin-s3", "swin_s3_tiny_224", "swin_transformer"),
    _transformer("swinv2", "swinv2_tiny_window8_256", "swin_transformer_v2"),
    _transformer("swinv2-cr", "swinv2_cr_tiny_224", "swin_transformer_v2_cr"),
    _transformer("twins-pcpvt", "twins_pcpvt_small", "twins"),
    _transformer("twins-svt", "twins_svt_small", "twins"),
    _transformer("mvitv2", "mvitv2_tiny", "mvitv2"),
    _transformer("nest", "nest_tiny", "nest"),
    _transformer("davit", "davit_tiny", "davit"),
    _transformer("gcvit", "gcvit_xxtiny", "gcvit"),
    _transformer("hiera", "hiera_tiny_224", "hiera"),
    _transformer("hieradet", "hieradet_small", "hieradet_sam2"),
    _transformer("poolformer", "poolformer_s12", "metaformer"),
    _transformer("poolformerv2", "poolformerv2_s12", "metaformer"),
    _transformer("sequencer2d", "sequencer2d_s", "sequencer"),
    _hybrid("focalnet", "focalnet_tiny_srf", "focalnet"),
    _hybrid("pvtv2", "pvt_v2_b0", "pvt_v2"),
    _hybrid("coat", "coat_tiny", "coat"),
    _hybrid("coat-lite", "coat_lite_tiny", "coat"),
    _hybrid("convit", "convit_tiny", "convit"),
    _hybrid("levit", "levit_128s", "levit"),
    _hybrid("levit-conv", "levit_conv_128s", "levit"),
    _hybrid("vit-resnet", "vit_tiny_r_s16_p8_224", "vision_transformer_hybrid"),
    _hybrid("visformer", "visformer_tiny", "visformer"),
    _hybrid("maxvit", "maxvit_pico_rw_256", "maxxvit"),
    _hybrid("maxxvit", "maxxvit_rmlp_nano_rw_256", "maxxvit"),
    _hybrid("coatnet", "coatnet_pico_rw_224", "maxxvit"),
    _hybrid("coatnext", "coatnext_nano_rw_224", "maxxvit"),
    _hybrid("caformer", "caformer_s18", "metaformer"),
    _hybrid("convformer", "convformer_s18", "metaformer"),
    _hybrid("efficientformer", "efficientformer_l1", "efficientformer"),
    _hybrid("efficientformerv2", "efficientformerv2_s0", "efficientformer_v2"),
    _hybrid("efficientvit-mit", "efficientvit_b0", "efficientvit_mit"),
    _hybrid("efficientvit-msra", "efficientvit_m0", "efficientvit_msra"),
    _hybrid("efficientvim", "efficientvim_m1", "efficientvim"),
    _hybrid("mobilevit", "mobilevit_xxs", "mobilevit"),
    _hybrid("mobilevitv2", "mobilevitv2_050", "mobilevit"),
    _hybrid("mobilenetv4-hybrid", "mobilenetv4_hybrid_medium_075", "mobilenetv3"),
    _hybrid("mobilenetv5", "mobilenetv5_base", "mobilenetv5"),
    _hybrid("edgenext", "edgenext_xx_small", "edgenext"),
    _hybrid("swiftformer", "swiftformer_xs", "swiftformer"),
    _hybrid("tiny-vit", "tiny_vit_5m_224", "tiny_vit"),
    _hybrid("fastvit", "fastvit_t8", "fastvit"),
    _hybrid("fastvit-sa", "fastvit_sa12", "fastvit"),
    _hybrid("repvit", "repvit_m0_9", "repvit"),
    _hybrid("nextvit", "nextvit_small", "nextvit"),
    _hybrid("shvit", "shvit_s1", "shvit"),
    _hybrid("iformer", "iformer_t", "iformer"),
    _hybrid("lowformer", "lowformer_b0", "lowformer"),
    _hybrid("cpubone", "cpubone_nano", "cpubone"),
    _hybrid("vitamin", "vitamin_small_224", "vitamin"),
    _hybrid("csatv2", "csatv2", "csatv2"),
    _hybrid("mambaout", "mambaout_femto", "mambaout"),
    _hybrid("inception-next", "inception_next_atto", "inception_next"),
    _hybrid("botnet", "botnet26t_256", "byoanet"),
    _hybrid("halonet", "halonet_h1", "byoanet"),
    _hybrid("lambda-resnet", "lambda_resnet26t", "byoanet"),
)

NOT_CLASSIFIERS = {
    "deepseek_vit": "the image encoder of a language model, 412 M parameters or more",
    "gemma4_vit": "the image encoder of a language model, 167 M parameters or more",
    "qwen3_vit": "the image encoder of a language model: it gives features of patches, not logits",
}
"""Modules of timm that hold transformers and are left out, and why."""

CONVOLUTIONAL = (
    "byobnet",
    "convmixer",
    "convnext",
    "cspnet",
    "cspnext",
    "densenet",
    "dla",
    "dpn",
    "efficientnet",
    "fasternet",
    "ghostnet",
    "hardcorenas",
    "hgnet",
    "hrnet",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2",
    "mlp_mixer",
    "nasnet",
    "nfnet",
    "pnasnet",
    "rdnet",
    "regnet",
    "repghost",
    "res2net",
    "resnest",
    "resnet",
    "resnetv2",
    "rexnet",
    "selecsls",
    "senet",
    "sknet",
    "starnet",
    "tresnet",
    "vgg",
    "vovnet",
    "xception",
    "xception_aligned",
)
"""Modules of timm that hold convolutional networks and multilayer perceptrons alone."""


def chosen(names: tuple[str, ...]) -> tuple[Family, ...]:
    """The families named, in their order here; all of them where none is. Raises :class:`UnknownName`."""
    known = [f.name for f in FAMILIES]
    for name in names:
        if name not in known:
            raise UnknownName("family", name, known, hint="edgevit coverage --list")
    return tuple(f for f in FAMILIES if not names or f.name in names)
