"""Phantoms: plausible tissues, the same for a seed, two grids over one body, and truths that can be learnt."""

import csv
import json
import time

import numpy as np
import pytest
from scipy import ndimage

from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Grid, grids_differ_mm, onto_grid, read_image, read_labels
from unicon_pipeline.phantom_render import ORGANS, scan_pet
from unicon_pipeline.phantom_scene import PREVALENCE, draw_scene
from unicon_pipeline.phantoms import MODALITIES, case_seed, make_phantom, write_phantom_images, write_phantom_task

SMALL = {"shape_zyx": (20, 32, 32), "spacing_zyx_mm": (10.0, 9.0, 9.0)}
COHORT = range(100, 140)


@pytest.fixture(scope="module")
def cohort():
    return [make_phantom(seed) for seed in COHORT]


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in range(800)]


def auc(score, truth):
    """Mann-Whitney: how often a case with the finding scores higher than one without."""
    score, truth = np.asarray(score, float), np.asarray(truth, bool)
    return np.mean(np.sign(score[truth][:, None] - score[~truth][None]) / 2 + 0.5)


def world_xyz(index_zyx, grid):
    return np.asarray(index_zyx)[..., ::-1] * grid.spacing_zyx_mm[::-1] + grid.origin_xyz_mm


def organ_core(phantom, organ):
    """Voxels well inside an organ, away from lesions."""
    inside = ndimage.binary_erosion(phantom.organs.array_zyx == ORGANS[organ])
    return inside & ~ndimage.binary_dilation(phantom.lesions.array_zyx > 0, iterations=3)


class TestTissues:
    @pytest.mark.parametrize(
        ("organ", "low", "high"),
        [("fat", -115, -85), ("muscle", 40, 60), ("heart", 38, 56), ("liver", 50, 70), ("air", -1001, -985)],
    )
    def test_ct_of_soft_tissue_and_air(self, cohort, organ, low, high):
        for phantom in cohort[:12]:
            assert low < phantom.ct.array_zyx[organ_core(phantom, organ)].mean() < high

    def test_ct_of_lung_and_bone(self, cohort):
        for phantom in cohort[:12]:
            lung = np.median(phantom.ct.array_zyx[organ_core(phantom, "lung")])
            assert (-960 < lung < -890) if phantom.findings["emphysema"] else (-900 < lung < -800)
            bone = phantom.ct.array_zyx[phantom.organs.array_zyx == ORGANS["bone"]]
            assert 300 < np.median(bone) < 700

    def test_ct_is_noisy_whole_hu_within_the_scanner_range(self, cohort):
        for phantom in cohort[:6]:
            ct = phantom.ct.array_zyx
            assert ct.dtype == np.float32
            assert np.array_equal(ct, np.rint(ct))
            assert ct.min() >= -1024
            assert ct.max() <= 3071
            assert 6 < ct[organ_core(phantom, "liver")].std() < 30

    @pytest.mark.parametrize(("organ", "low", "high"), [("muscle", 0.5, 1.0), ("liver", 2, 3), ("lung", 0.3, 0.7)])
    def test_suv(self, cohort, organ, low, high):
        for phantom in cohort[:12]:
            pet = onto_grid(phantom.pet, phantom.ct.grid, 0.0).array_zyx
            core = ndimage.binary_erosion(organ_core(phantom, organ))
            assert low < np.median(pet[core]) < high

    def test_suv_noise_grows_like_counts(self, cohort):
        """Poisson: variance proportional to uptake, so liver against muscle about 2.5 : 0.7."""
        ratios = []
        for phantom in cohort[:12]:
            labels = onto_grid(phantom.organs, phantom.pet.grid, 0.0, nearest=True).array_zyx
            lesions = onto_grid(phantom.lesions, phantom.pet.grid, 0.0, nearest=True).array_zyx > 0
            rough = phantom.pet.array_zyx - ndimage.uniform_filter(phantom.pet.array_zyx, 3)
            far = ~ndimage.binary_dilation(lesions, iterations=4)
            variance = {}
            for organ in ("liver", "muscle"):
                core = ndimage.binary_erosion(labels == ORGANS[organ], iterations=2) & far
                variance[organ] = rough[core].var()
            ratios.append(variance["liver"] / variance["muscle"])
        assert 2 < np.median(ratios) < 6


class TestPet:
    def test_own_coarser_shifted_grid_over_the_same_body(self, cohort):
        for phantom in cohort:
            ct, pet = phantom.ct.grid, phantom.pet.grid
            assert grids_differ_mm(ct, pet) == float("inf")
            assert np.prod(pet.spacing_zyx_mm) > np.prod(ct.spacing_zyx_mm)
            assert 4 < pet.spacing_zyx_mm[1] < 5.6
            assert pet.spacing_zyx_mm[0] != ct.spacing_zyx_mm[0]
            assert not np.allclose(pet.origin_xyz_mm, ct.origin_xyz_mm, atol=0.1)
            body = ndimage.binary_erosion(phantom.organs.array_zyx > 0, iterations=2)
            warm = onto_grid(phantom.pet, ct, 0.0).array_zyx > 0.15
            assert (warm & body).sum() > 0.95 * body.sum()

    def test_hot_lesions_are_hot_spots_in_place(self, cohort):
        checked = 0
        for seed, phantom in zip(COHORT, cohort):
            hot_enough = min(lesion.suv for lesion in draw_scene(seed).lesions) > 4
            parts, count = ndimage.label(phantom.lesions.array_zyx)
            pet, grid = phantom.pet.array_zyx, phantom.pet.grid
            places = world_xyz(np.moveaxis(np.indices(pet.shape), 0, -1), grid)
            for part in range(1, count + 1) if hot_enough else ():
                voxels = world_xyz(np.argwhere(parts == part), phantom.ct.grid)
                centre = voxels.mean(axis=0)
                near = np.linalg.norm(places - centre, axis=-1) < np.linalg.norm(voxels - centre, axis=1).max() + 6
                spot = near & (pet > 0.6 * pet[near].max())
                away = np.average(places[spot], axis=0, weights=pet[spot]) - centre
                assert (np.abs(away) < grid.spacing_zyx_mm[::-1]).all(), seed
                assert pet[near].max() > 2.5
                checked += 1
        assert checked > 20

    @pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.5, 1.0, 1.0), (4.0, 4.0, 4.0)])
    def test_a_point_source_is_as_wide_as_asked(self, spacing):
        shape = tuple(int(round(80 / step)) for step in spacing)
        grid = Grid(shape, spacing, (3.0, -20.0, 7.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        activity = np.zeros(shape, np.float32)
        middle = tuple(n // 2 for n in shape)
        activity[middle] = 1e7
        widths = []
        for seed in range(12):  # where the point falls between the voxels changes the width a little
            image = scan_pet(activity, grid, 6.0, np.random.default_rng(seed))
            places = world_xyz(np.moveaxis(np.indices(image.array_zyx.shape), 0, -1), image.grid)
            away = (places - world_xyz(middle, grid)).reshape(-1, 3)
            weights = np.clip(image.array_zyx.ravel() - 0.2, 0, None)
            mean = np.average(away, axis=0, weights=weights)
            widths.append(2.3548 * np.sqrt(np.average((away - mean) ** 2, axis=0, weights=weights)))
        assert np.mean(widths, axis=0) == pytest.approx(6.0, rel=0.1)

    def test_every_scanner_is_between_5_and_7_mm(self, scenes):
        assert all(5 <= scene.anatomy.fwhm_mm <= 7 for scene in scenes)


class TestDeterminism:
    def test_same_seed_same_arrays(self):
        first, second = make_phantom(7), make_phantom(7)
        for name in ("ct", "pet", "lesions", "organs"):
            assert np.array_equal(getattr(first, name).array_zyx, getattr(second, name).array_zyx)
            assert getattr(first, name).grid == getattr(second, name).grid
        assert (first.findings, first.clinical, first.time_days) == (
            second.findings, second.clinical, second.time_days,
        )  # fmt: skip

    def test_other_seeds_are_other_bodies(self, cohort):
        muscle = [int((phantom.organs.array_zyx == ORGANS["muscle"]).sum()) for phantom in cohort]
        assert len(set(muscle)) == len(cohort)
        assert np.std(muscle) > 0.05 * np.mean(muscle)

    def test_the_grid_changes_no_truth(self):
        fine, coarse = make_phantom(11), make_phantom(11, **SMALL)
        assert fine.findings == coarse.findings
        assert (fine.time_days, fine.event, fine.log_hazard) == (coarse.time_days, coarse.event, coarse.log_hazard)

    def test_global_random_state_is_untouched(self):
        np.random.seed(3)
        expected = np.random.random()
        np.random.seed(3)
        make_phantom(1, **SMALL)
        assert np.random.random() == expected

    def test_it_is_fast(self):
        def seconds():
            start = time.process_time()
            make_phantom(5)
            return time.process_time() - start

        assert min(seconds() for _ in range(3)) < 0.5


class TestLesions:
    def test_sizes_counts_and_sites(self, scenes):
        counts = np.bincount([len(scene.lesions) for scene in scenes], minlength=5)
        assert counts[0] == 0
        assert counts.size == 5
        assert (counts[1:] > 0.05 * len(scenes)).all()
        lesions = [lesion for scene in scenes for lesion in scene.lesions]
        diameters = np.array([2 * np.prod(lesion.semi_xyz_mm) ** (1 / 3) for lesion in lesions])
        assert diameters.min() >= 7.99
        assert diameters.max() <= 40.01
        assert {lesion.site for lesion in lesions} == {"lung", "mediastinum", "liver", "chest_wall"}

    def test_every_lesion_is_labelled_even_on_a_coarse_grid(self):
        for seed in range(30):
            scene = draw_scene(seed)
            separate = ndimage.label(make_phantom(seed, **SMALL).lesions.array_zyx, np.ones((3, 3, 3)))[1]
            assert 1 <= separate <= len(scene.lesions)

    def test_labelled_volumes_are_those_of_the_scene(self):
        """Lobes move a surface by up to 18 % of its radius, so a volume by a factor of 0.61 to 1.81 (and what the grid
        adds to a small one); on average they move nothing."""
        ratios = []
        for seed in range(30):
            scene, labels = draw_scene(seed), make_phantom(seed).lesions
            volume_ml = labels.array_zyx.sum() * np.prod(labels.grid.spacing_zyx_mm) / 1000
            ratios.append(volume_ml / sum(lesion.volume_ml for lesion in scene.lesions))
        assert 0.6 < min(ratios)
        assert max(ratios) < 2
        assert np.mean(ratios) == pytest.approx(1, abs=0.08)

    def test_each_shows_in_ct_or_pet_and_some_in_one_only(self, cohort):
        only_ct = only_pet = 0
        for seed, phantom in zip(COHORT, cohort):
            scene = draw_scene(seed)
            if len(scene.lesions) > 1:
                continue
            mask = phantom.lesions.array_zyx > 0
            around = ndimage.binary_dilation(mask, iterations=3) & ~ndimage.binary_dilation(mask)
            ct, pet = phantom.ct.array_zyx, onto_grid(phantom.pet, phantom.ct.grid, 0.0).array_zyx
            in_ct = abs(ct[mask].mean() - np.median(ct[around])) > 25
            in_pet = pet[mask].mean() > 1.2 * np.percentile(pet[around], 90)  # small ones in the liver are blurred
            assert in_ct or in_pet, seed
            only_ct += in_ct and not in_pet
            only_pet += in_pet and not in_ct
        assert only_pet >= 2
        cold = [scene for scene in map(draw_scene, range(400)) if any(lesion.suv < 2 for lesion in scene.lesions)]
        assert len(cold) > 40

    def test_uptake(self, scenes):
        suv = np.array([lesion.suv for scene in scenes for lesion in scene.lesions])
        assert ((suv > 4) & (suv <= 20)).mean() > 0.75
        assert suv.max() <= 20

    def test_warm_tissue_that_is_no_lesion(self, cohort):
        warm = 0
        for phantom in cohort:
            pet = onto_grid(phantom.pet, phantom.ct.grid, 0.0).array_zyx
            heart = organ_core(phantom, "heart")
            warm += np.percentile(pet[heart], 95) > 2.5
        assert 0.15 * len(cohort) < warm < 0.85 * len(cohort)


class TestFindings:
    def test_prevalences(self, scenes):
        for name in PREVALENCE:
            assert 0.25 < np.mean([scene.findings[name] for scene in scenes]) < 0.5

    def test_each_can_be_read_from_the_ct(self, cohort):
        """One hand-made measurement of the CT per finding tells its cases apart."""

        def smooth(phantom):
            return ndimage.uniform_filter(phantom.ct.array_zyx, 3)

        def chest(phantom):
            return phantom.ct.array_zyx[10:]  # above the liver's widest part

        def deep_in_lung(phantom):  # walls are half air, half tissue, as a consolidation is
            lung = np.isin(phantom.organs.array_zyx, [ORGANS["lung"], ORGANS["other"]])
            return smooth(phantom)[ndimage.binary_erosion(lung, iterations=4) & (np.indices(lung.shape)[0] > 20)]

        measured = {
            "emphysema": lambda p: (p.ct.array_zyx[p.organs.array_zyx == ORGANS["lung"]] < -950).mean(),
            "bone_lesion": lambda p: (chest(p) > 850).sum(),
            "cardiomegaly": lambda p: (p.organs.array_zyx == ORGANS["heart"]).sum(),
            "pleural_effusion": lambda p: ((smooth(p) > 0) & (smooth(p) < 16)).sum(),
            "consolidation": lambda p: ((deep_in_lung(p) > -700) & (deep_in_lung(p) < -150)).sum(),
        }
        for name, feature in measured.items():
            assert auc([feature(p) for p in cohort], [p.findings[name] for p in cohort]) > 0.8, name

    def test_nodules_and_masses_are_lesions_of_their_size(self, scenes):
        for scene in scenes:
            sizes = [2 * np.prod(lesion.semi_xyz_mm) ** (1 / 3) for lesion in scene.lesions]
            small_in_lung = any(s <= 24.01 and t.site == "lung" for s, t in zip(sizes, scene.lesions))
            assert scene.findings["mass"] == (max(sizes) > 30)
            assert scene.findings["nodule"] == small_in_lung


class TestSurvival:
    def test_higher_hazard_earlier_event(self, scenes):
        """Harrell's C-index of the oracle, over comparable pairs."""
        hazard = np.array([scene.log_hazard for scene in scenes])
        days, event = np.array([[scene.time_days, scene.event] for scene in scenes]).T
        comparable = (event[:, None] == 1) & (days[:, None] < days[None])
        assert 0.68 < (hazard[:, None] > hazard[None])[comparable].mean() < 0.85

    def test_hazard_rises_with_volume_uptake_age_and_stage(self, scenes):
        whole = [scene for scene in scenes if None not in scene.clinical.values()]
        columns = [
            [np.log(sum(lesion.volume_ml for lesion in scene.lesions)) for scene in whole],
            [np.log(max(lesion.suv for lesion in scene.lesions)) for scene in whole],
            [scene.clinical["age"] for scene in whole],
            [["I", "II", "III", "IV"].index(scene.clinical["stage"]) for scene in whole],
            [scene.clinical["sex"] == "M" for scene in whole],
        ]
        design = np.array([*columns, np.ones(len(whole))], float).T
        slopes, *_ = np.linalg.lstsq(design, [scene.log_hazard for scene in whole])
        assert (slopes[:-1] > 0).all()

    def test_censoring_and_gaps(self, scenes):
        assert 0.35 < 1 - np.mean([scene.event for scene in scenes]) < 0.45
        assert min(scene.time_days for scene in scenes) >= 1
        gaps = {key: np.mean([s.clinical[key] is None for s in scenes]) for key in ("age", "sex", "stage", "weight_kg")}
        assert gaps["sex"] == 0
        assert 0.02 < gaps["age"] < gaps["stage"] < gaps["weight_kg"] < 0.2


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestFolders:
    def test_lesion_task(self, tmp_path):
        folder = write_phantom_task(tmp_path / "A task", "lesions", 2, 5, modalities=MODALITIES, **SMALL)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
        images = [f"imagesTr/phantom_{case:04d}_{channel:04d}.nii.gz" for case in (1, 2) for channel in (0, 1)]
        assert names == ["dataset.json", *images, "labelsTr/phantom_0001.nii.gz", "labelsTr/phantom_0002.nii.gz"]
        assert json.loads((folder / "dataset.json").read_text()) == {
            "channel_names": {"0": "CT", "1": "PET"},
            "labels": {"background": 0, "lesion": 1},
            "file_ending": ".nii.gz",
            "numTraining": 2,
            "task_type": "segmentation",
        }
        expected = make_phantom(case_seed(5, 1), **SMALL)
        ct, pet = (read_image(folder / f"imagesTr/phantom_0002_{channel:04d}.nii.gz") for channel in (0, 1))
        labels = read_labels(folder / "labelsTr/phantom_0002.nii.gz")
        assert np.array_equal(ct.array_zyx, expected.ct.array_zyx)
        assert np.array_equal(pet.array_zyx, expected.pet.array_zyx)
        assert np.array_equal(labels.array_zyx, expected.lesions.array_zyx)
        assert grids_differ_mm(labels.grid, ct.grid) < 1e-3
        assert grids_differ_mm(pet.grid, expected.pet.grid) < 1e-3

    def test_labels_of_a_pet_task_lie_on_the_pet(self, tmp_path):
        folder = write_phantom_task(tmp_path, "lesions", 1, 5, modalities=("PET",))
        pet, labels = read_image(folder / "imagesTr/phantom_0001_0000.nii.gz"), folder / "labelsTr/phantom_0001.nii.gz"
        labels = read_labels(labels)
        assert grids_differ_mm(pet.grid, labels.grid) < 1e-3
        assert set(np.unique(labels.array_zyx)) == {0, 1}

    def test_findings_task_has_every_cell_but_a_few_blanks(self, tmp_path):
        folder = write_phantom_task(tmp_path, "findings", 24, 1, shape_zyx=(8, 8, 8), spacing_zyx_mm=(40, 36, 48))
        rows = rows_of(folder / "targets.csv")
        assert list(rows[0]) == ["case_id", *PREVALENCE]
        assert [row["case_id"] for row in rows] == [f"phantom_{case:04d}" for case in range(1, 25)]
        cells = [row[name] for row in rows for name in PREVALENCE]
        assert set(cells) == {"0", "1", ""}
        assert cells.count("") < 0.15 * len(cells)
        for index, row in enumerate(rows):
            truth = draw_scene(case_seed(1, index)).findings
            assert all(row[name] in ("", str(truth[name])) for name in PREVALENCE)

    def test_survival_task_has_targets_and_covariates_with_gaps(self, tmp_path):
        folder = write_phantom_task(tmp_path, "survival", 24, 2, shape_zyx=(8, 8, 8), spacing_zyx_mm=(40, 36, 48))
        targets, clinical = rows_of(folder / "targets.csv"), rows_of(folder / "clinical.csv")
        assert list(targets[0]) == ["case_id", "time_days", "event"]
        assert list(clinical[0]) == ["case_id", "age", "sex", "stage", "weight_kg"]
        assert [row["case_id"] for row in targets] == [row["case_id"] for row in clinical]
        assert all(float(row["time_days"]) > 0 and row["event"] in ("0", "1") for row in targets)
        assert any("" in row.values() for row in clinical)
        assert json.loads((folder / "dataset.json").read_text())["task_type"] == "prognosis"

    @pytest.mark.parametrize("kind", ["findings", "survival"])
    def test_a_region_brings_its_labels(self, tmp_path, kind):
        dataset = pytest.importorskip("unicon_pipeline.dataset")
        folder = write_phantom_task(tmp_path / kind, kind, 4, 2, modalities=MODALITIES, region="Lesions", **SMALL)
        task = dataset.read_task(folder)
        assert (task.region, task.labels.names) == ("Lesions", ("lesion",))
        expected = make_phantom(case_seed(2, 3), **SMALL).lesions
        assert np.array_equal(read_labels(task.cases[3].labels).array_zyx, expected.array_zyx)
        with pytest.raises(DatasetError, match="segmentation task"):
            write_phantom_task(tmp_path / "other", "lesions", 1, 0, region="Lesions")

    def test_cases_of_two_tasks_are_different_patients(self):
        assert not {case_seed(1, i) for i in range(500)} & {case_seed(2, i) for i in range(500)}

    def test_images_for_a_prediction(self, tmp_path):
        truths = write_phantom_images(tmp_path, [3, 4], ("PET",), **SMALL)
        names = sorted(path.name for path in tmp_path.iterdir())
        images = ["phantom_0001_0001.nii.gz", "phantom_0002_0001.nii.gz"]
        assert names == ["clinical.csv", "dataset.json", *images]
        assert list(truths) == ["phantom_0001", "phantom_0002"]
        assert np.array_equal(read_image(tmp_path / names[-1]).array_zyx, truths["phantom_0002"].pet.array_zyx)

    @pytest.mark.parametrize("kind", ["lesions", "findings", "survival"])
    def test_tasks_are_read_by_the_package(self, tmp_path, kind):
        dataset = pytest.importorskip("unicon_pipeline.dataset")
        folder = write_phantom_task(tmp_path / kind, kind, 4, 9, modalities=MODALITIES, **SMALL)
        task = dataset.read_task(folder)
        assert task.modalities == MODALITIES
        assert [case.case_id for case in task.cases] == [f"phantom_{case:04d}" for case in range(1, 5)]
        assert (task.labels is not None) == (kind == "lesions")
        volumes = dataset.read_case(task.cases[0])
        assert volumes["CT"].array_zyx.shape == volumes["PET"].array_zyx.shape

    @pytest.mark.parametrize(
        "arguments",
        [("other", 1, 0, ("CT",)), ("lesions", 0, 0, ("CT",)), ("lesions", 1, 0, ("MR",)), ("lesions", 1, 0, ())],
    )
    def test_what_cannot_be_made_is_refused(self, tmp_path, arguments):
        *positional, modalities = arguments
        with pytest.raises(DatasetError):
            write_phantom_task(tmp_path / "T", *positional, modalities=modalities)
        assert not (tmp_path / "T").exists()

    def test_impossible_grids_are_refused(self):
        with pytest.raises(DatasetError, match="at least 8 voxels"):
            make_phantom(0, shape_zyx=(4, 96, 96))
        with pytest.raises(DatasetError, match="positive"):
            make_phantom(0, spacing_zyx_mm=(5.0, 0.0, 4.0))
