"""A teacher from any family of diffusers pipelines has the E[x0 | x_t], guidance and images of its own pipeline."""

import json
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from conftest import ROOT, refuses
from pipelines import FAMILIES, PROMPTS, WIDTH, dit, ldm, pixart, sd, unet, vae

import teachers
from distill.schedule import EDM, Flow, Table
from teachers import diffusers_scheduler
from teachers.networks.records import ENCODERS

BETAS = {"epsilon": "scaled_linear", "v_prediction": "squaredcos_cap_v2", "sample": "linear"}


@pytest.mark.parametrize("name", diffusers_scheduler.DISCRETE)
@pytest.mark.parametrize("prediction", diffusers_scheduler.PREDICTIONS)
def test_every_scheduler_of_a_discrete_table_is_the_same_table(tmp_path, name, prediction):
    net = unet()
    options = {"prediction_type": prediction, "beta_schedule": BETAS[prediction], "beta_start": 0.001, "beta_end": 0.015}
    if name == "PNDMScheduler" and prediction == "sample":
        pytest.skip("PNDM has no sample prediction")
    if name in diffusers_scheduler.STOOD_IN:  # as saved by diffusers; one needs torchsde to be made
        diffusers.DDPMPipeline(net, diffusers.HeunDiscreteScheduler(**options)).save_pretrained(tmp_path)
        changed(tmp_path / "scheduler" / "scheduler_config.json", _class_name=name)
    else:
        pipeline = diffusers.DDIMPipeline if name == "DDIMScheduler" else diffusers.DDPMPipeline
        pipeline(net, getattr(diffusers, name)(**options)).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    assert teacher.shape == (3, 8, 8) and teacher.classes is None
    theirs = diffusers.DDIMScheduler(**options, clip_sample=False)
    theirs.set_timesteps(1000)
    x = torch.randn(2, 3, 8, 8)
    for index in (0, 400, 999):
        expected = theirs.step(net(x, index).sample, index, x).pred_original_sample
        assert torch.allclose(teacher.denoiser(x, torch.tensor((index + 1) / 1000)), expected, atol=1e-4, rtol=1e-4)


def test_an_euler_pipelines_own_step_gives_the_same_x0_from_the_scaled_sample(tmp_path):
    net, theirs = unet(), diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
    diffusers.DDPMPipeline(net, theirs).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    theirs.set_timesteps(4)
    t, x = theirs.timesteps[0], theirs.init_noise_sigma * torch.randn(2, 3, 8, 8)
    scaled = theirs.scale_model_input(x, t)
    expected = theirs.step(net(scaled, t).sample, t, x).pred_original_sample
    assert torch.allclose(teacher.denoiser(scaled, (t.double() + 1) / 1000), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_a_zero_terminal_snr_is_exactly_zero_and_refuses_eps(tmp_path, name):
    for prediction in ("v_prediction", "epsilon"):
        made = getattr(diffusers, name)(rescale_betas_zero_snr=True, prediction_type=prediction)
        diffusers.DDPMPipeline(unet(), made).save_pretrained(tmp_path)
        if prediction == "epsilon":
            refuses("divides by alpha", teachers.load, str(tmp_path))
        else:
            assert teachers.load(str(tmp_path)).denoiser.schedule.alphas_cumprod[-1] == 0


def test_trained_betas_are_the_table(tmp_path):
    betas = torch.linspace(0.01, 0.3, 7, dtype=torch.float64)
    diffusers.DDPMPipeline(
        unet(), diffusers.DDIMScheduler(trained_betas=betas.tolist(), num_train_timesteps=7)
    ).save_pretrained(tmp_path)
    schedule = teachers.load(str(tmp_path)).denoiser.schedule
    assert isinstance(schedule, Table)
    assert torch.allclose(torch.tensor(schedule.alphas_cumprod).double(), torch.cumprod(1 - betas, 0), atol=1e-6)


def test_a_learned_variance_is_dropped(tmp_path):
    net = unet(out_channels=6)
    diffusers.DDPMPipeline(net, diffusers.DDIMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(teachers.load(str(tmp_path)).denoiser(x, torch.tensor(0.5)), net(x, 499).sample[:, :3], atol=1e-5)


def again(model, tmp_path):
    """The model from its own file."""
    teachers.save(tmp_path / "model.safetensors", model)
    return teachers.load(str(tmp_path / "model.safetensors"))


def test_a_score_sde_network_is_given_sigma_and_images_in_0_1(tmp_path):
    net = unet(time_embedding_type="fourier")
    diffusers.ScoreSdeVePipeline(net, diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50)).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    schedule, x = teacher.denoiser.schedule, 3 * torch.randn(2, 3, 8, 8)
    for sigma in (0.01, 0.7, 50.0):  # of images in [0, 1], where Tweedie's formula is x + sigma^2 score
        t = schedule.time_of(torch.tensor(2 * sigma))
        unit = (x + 1) / 2
        expected = 2 * (unit + sigma**2 * net(unit, torch.full((2,), sigma)).sample) - 1
        for model in (teacher, again(teacher, tmp_path)):
            assert torch.allclose(model.denoiser(x, t), expected, atol=1e-3, rtol=1e-3)
    assert torch.allclose(schedule.sigma(torch.tensor([0.0, 1.0])), torch.tensor([0.02, 100.0]))


def test_a_karras_ve_network_is_read_as_its_pipeline_reads_it(tmp_path):
    net, theirs = unet(time_embedding_type="fourier"), diffusers.KarrasVeScheduler()
    diffusers.DDPMPipeline(net, theirs).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    x = 3 * torch.randn(2, 3, 8, 8)
    for sigma in (0.05, 1.0, 60.0):
        output = sigma / 2 * net((x + 1) / 2, torch.tensor(sigma / 2)).sample
        expected = theirs.step(output, sigma, 0.0, x).pred_original_sample
        t = teacher.denoiser.schedule.time_of(torch.tensor(sigma))
        assert torch.allclose(teacher.denoiser(x, t), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", diffusers_scheduler.PRECONDITIONED)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_edm_scheduler_preconditions_its_network(tmp_path, name, prediction):
    net, theirs = unet(), getattr(diffusers, name)(sigma_data=0.7, sigma_max=70.0, prediction_type=prediction)
    diffusers.DDPMPipeline(net, theirs).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    x = 3 * torch.randn(2, 3, 8, 8)
    for sigma in torch.tensor([0.01, 1.0, 60.0]):
        output = net(theirs.precondition_inputs(x, sigma), theirs.precondition_noise(sigma)).sample
        expected = theirs.precondition_outputs(x, output, sigma)
        for model in (teacher, again(teacher, tmp_path)):
            assert torch.allclose(model.denoiser(x, sigma), expected, atol=1e-5)
    assert teacher.denoiser.schedule == EDM(0.002, 70.0)


def test_a_consistency_network_keeps_its_boundary_and_its_classes(tmp_path):
    net = unet(num_class_embeds=5)
    theirs = diffusers.CMStochasticIterativeScheduler(sigma_min=0.01, sigma_data=0.4, clip_denoised=False)
    diffusers.ConsistencyModelPipeline(net, theirs).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    assert teacher.classes == 5 and teacher.sampling.name == "consistency"
    x, labels = 3 * torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    for index in (0, 20, 39):
        theirs.set_timesteps(timesteps=[index])
        t, sigma = theirs.timesteps[0], theirs.sigmas[0].float()
        output = net(theirs.scale_model_input(x, t), t, class_labels=labels).sample
        expected = theirs.step(output, t, x).prev_sample
        for model in (teacher, again(teacher, tmp_path)):
            assert torch.allclose(model.denoiser(x, sigma, labels=labels), expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(teacher.denoiser(x, torch.tensor(0.01), labels=labels), x, atol=1e-5)


def stock(pipeline, guidance):
    """Images in [0, 1] that the pipeline itself makes in one step from the noise of seed 5."""
    pipeline.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(5)}
    if isinstance(pipeline, diffusers.LDMPipeline):
        images = pipeline(2, **common).images
    elif isinstance(pipeline, diffusers.DiTPipeline):
        images = pipeline([1, 2], guidance_scale=guidance, **common).images
    else:
        pixart = isinstance(pipeline, (diffusers.PixArtSigmaPipeline, diffusers.PixArtAlphaPipeline))
        extra = {"use_resolution_binning": False, "clean_caption": False} if pixart else {}
        images = pipeline(PROMPTS[1:], guidance_scale=guidance, height=16, width=16, **extra, **common).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_latent_teacher_and_its_file_give_the_pixels_of_their_own_pipeline(tmp_path, family):
    made = FAMILIES[family](tmp_path / "parts")
    made.save_pretrained(tmp_path / "pipeline")
    pipeline = type(made).from_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    prompted = type(pipeline).__name__ in ENCODERS
    spec = str(tmp_path / "pipeline")
    teacher = teachers.load(f"{spec},prompts={tmp_path / 'prompts.txt'}" if prompted else spec)
    assert teacher.classes == (3 if prompted else 1000 if family == "DiT" else None)
    assert teacher.shape == (3 if "VQ" in family else 4, 8, 8) and teacher.image_shape == (3, 16, 16)
    noise = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(5))
    copy = again(teacher, tmp_path)
    assert copy.describe() == teacher.describe() and copy.fingerprint == teacher.fingerprint
    if prompted:  # a file holds no prompts
        copy = teachers.load(f"{tmp_path / 'model.safetensors'},prompts={tmp_path / 'prompts.txt'}")
    scales = (1.0,) if teacher.classes is None else (1.0, 3.0)
    for guidance in scales:
        expected = stock(pipeline, guidance)
        for model in (teacher, copy):
            with torch.no_grad():
                cond = model.condition(torch.tensor([1, 2]))
                x0 = model.guided(guidance)(noise, torch.tensor(model.denoiser.schedule.t_max), **cond)
            assert torch.allclose((model.decode(x0) / 2 + 0.5).clamp(0, 1), expected, atol=1e-4)
            assert expected.std() > 0.01 and ((expected > 0) & (expected < 1)).float().mean() > 0.1


def test_a_pixart_network_is_conditioned_on_the_resolution_of_the_image(tmp_path):
    from teachers.networks.records.pixart import PixArt

    wide = {"attention_head_dim": 12, "cross_attention_dim": 24}
    net = pixart(tmp_path, diffusers.PixArtAlphaPipeline, use_additional_conditions=True, **wide).transformer
    x, text, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 5, WIDTH), torch.ones(2, 5)
    size = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
    with torch.no_grad():
        expected = net(x, text, torch.tensor([300, 300]), size, encoder_attention_mask=mask).sample[:, :4]
        assert torch.allclose(PixArt(net)(x, torch.tensor([300.0, 300.0]), text, mask), expected, atol=1e-5)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """The folder of a Stable Diffusion pipeline, and a file of prompts."""
    folder = tmp_path_factory.mktemp("prompted")
    sd(folder / "parts").save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("a cat\n\ntwo dogs\n")
    return folder / "pipeline", folder / "prompts.txt"


def test_a_flow_networks_x0_is_x_minus_sigma_v_for_any_shift_of_its_grid(tmp_path):
    net, theirs = unet(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    diffusers.DDPMPipeline(net, theirs).save_pretrained(tmp_path)
    teacher, x = teachers.load(str(tmp_path)), torch.randn(2, 3, 8, 8)
    assert teacher.denoiser.schedule == Flow() and teacher.record["shift"] == 3.0
    theirs.set_timesteps(10)
    for t, sigma in zip(theirs.timesteps, theirs.sigmas):
        assert torch.allclose(teacher.denoiser(x, sigma), x - sigma * net(x, t).sample, atol=1e-4)
    diffusers.DDPMPipeline(net, diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
                 ).save_pretrained(tmp_path)  # fmt: skip
    assert torch.equal(teachers.load(str(tmp_path)).denoiser(x, torch.tensor(0.6)), teacher.denoiser(x, torch.tensor(0.6)))


def test_a_text_teacher_is_conditioned_on_the_embeddings_of_its_prompts_in_place_of_labels(prompted):
    teacher = teachers.load(f"{prompted[0]},prompts={prompted[1]}")
    assert teacher.classes == teacher.null == 2 and teacher.embeddings.prompts == ["a cat", "two dogs"]
    labels = torch.tensor([1, 0, 1])
    cond = teacher.condition(labels)
    assert torch.equal(cond["text"], teacher.embeddings.lookup.rows["text"][labels]) and "labels" not in cond
    student = teacher.student()
    x, t = torch.randn(3, *teacher.shape), torch.tensor(0.5)
    assert torch.equal(student(x, t, **cond), teacher.denoiser(x, t, **cond))
    student(x, t, **cond).mean().backward()
    assert all(p.grad is not None for p in student.net.parameters())


def test_a_dits_own_label_dropout_is_off_in_training(tmp_path):
    dit(tmp_path).save_pretrained(tmp_path)
    teacher = teachers.load(str(tmp_path))
    student, x = teacher.student(), torch.randn(64, *teacher.shape)
    student.net.train()
    labels, t = torch.arange(64), torch.tensor(0.5)
    assert teacher.null == 1000 and torch.equal(student(x, t, labels=labels), teacher.denoiser(x, t, labels=labels))


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_broken_pipeline_is_refused_in_one_line_with_the_reason(tmp_path, prompted):
    pipeline, lines = prompted
    folder = tmp_path / "copy"
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')")

    def scheduler(**values):
        return lambda: changed(folder / "scheduler" / "scheduler_config.json", **values)

    def index(**values):
        return lambda: changed(folder / "model_index.json", **values)

    def without(name):
        path = folder / name
        return lambda: shutil.rmtree(path) if path.is_dir() else path.unlink()

    nothing, given = lambda: None, f"{folder},prompts={lines}"
    for change, spec, message in (
        (nothing, f"{folder},prompts={tmp_path / 'empty.txt'}", "the file is empty; accepted is one prompt per line"),
        (nothing, f"{folder},prompts={tmp_path / 'none.txt'}", "not a readable text file"),
        (nothing, f"{folder},steps=3", "unknown option 'steps=3'; accepted are prompts=FILE"),
        (scheduler(_class_name="VQDiffusionScheduler"), given, "scheduler VQDiffusionScheduler; accepted are DDPMScheduler"),
        (scheduler(prediction_type="velocity"), given, "prediction_type 'velocity'; accepted are epsilon"),
        (scheduler(beta_schedule="mine"), given, "DDIMScheduler: mine"),
        (scheduler(_class_name="EulerDiscreteScheduler", timestep_type="continuous"), given, "accepted are discrete"),
        (without("scheduler"), given, "lacks its scheduler"),
        (without("unet/config.json"), given, "lacks unet/config.json"),
        (without("unet/diffusion_pytorch_model.safetensors"), given, "lacks the safetensors weights of unet"),
        (without("vae/diffusion_pytorch_model.safetensors"), given, "lacks the safetensors weights of vae"),
        (without("text_encoder/model.safetensors"), given, "a text encoder or tokenizer cannot be read"),
        (without("tokenizer"), given, "lacks tokenizer/"),
        (index(unet=["mine", "Net"]), given, "unet is code outside of diffusers (mine.Net), which is not run"),
        (index(unet=["diffusers", "UNet1DModel"]), given, "class UNet1DModel; accepted are UNet2D, ... networks/records"),
        (index(_class_name="StableDiffusionInpaintPipeline"), str(folder), "are its pipelines StableDiffusionPipeline, "),
        (index(_class_name="StableDiffusionInpaintPipeline"), given, "takes no prompts"),
    ):  # fmt: skip
        shutil.copytree(pipeline, folder)
        shutil.copy(tmp_path / "mine.py", folder / "mine.py")
        change()
        refuses(message, teachers.load, spec)
        shutil.rmtree(folder)


def test_a_students_autoencoder_is_read_from_its_source_and_missed_when_the_file_is_loaded(tmp_path):
    ldm(tmp_path, vae()).save_pretrained(tmp_path / "pipeline")
    copy = again(teachers.load(str(tmp_path / "pipeline")), tmp_path)
    assert copy.codec.vae is None and "network" not in vars(copy.codec)
    assert copy.image_shape == (3, 16, 16)
    shutil.rmtree(tmp_path / "pipeline" / "vqvae")
    refuses("there is no vqvae in it any more", teachers.load, str(tmp_path / "model.safetensors"))


@pytest.mark.slow
def test_the_embedded_teacher_loads_without_diffusers_pipelines():
    code = "import sys, teachers; teachers.load('digits'); assert not [m for m in sys.modules if 'diffusers.pipelines' in m]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
