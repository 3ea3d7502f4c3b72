"""The NIfTI reader against ITK's, and against headers and files that are not what they claim."""

import gzip
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from unicon_pipeline import nifti
from unicon_pipeline.errors import DatasetError

SHAPE = (4, 5, 6)
OBLIQUE = Rotation.from_euler("xyz", [13, -21, 34], degrees=True).as_matrix()
NUMBERS = np.random.default_rng(0).integers(0, 100, SHAPE)

# Where a NIfTI-1 header keeps what is changed below.
DIM, CODE, PIXDIM, OFFSET, SLOPE, UNITS, FORM_CODES, QUATERNION, SROW = 40, 70, 76, 108, 112, 123, 252, 256, 280


def file_bytes(tmp_path, array=None, direction=None):
    """As ITK writes it: 1 x 2 x 3 mm (x, y, z) at (10, -20, 30)."""
    image = sitk.GetImageFromArray(NUMBERS.astype(np.float32) if array is None else array)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(np.ravel(np.eye(3) if direction is None else direction).tolist())
    path = tmp_path / "as_itk_writes_it.nii"
    sitk.WriteImage(image, str(path))
    return bytearray(path.read_bytes())


def saved(tmp_path, data, name="image.nii"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def itk_affine(path):
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return affine


def refused(path, *words):
    with pytest.raises(DatasetError) as caught:
        nifti.read_nifti(path)
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)


class TestAgainstItk:
    @pytest.mark.parametrize(
        "dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
    )
    def test_types_of_voxel(self, tmp_path, dtype):
        array, _ = nifti.read_nifti(saved(tmp_path, file_bytes(tmp_path, NUMBERS.astype(dtype))))
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, NUMBERS)

    @pytest.mark.parametrize("qform_code,sform_code", [(1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (0, 4), (0, 0)])
    @pytest.mark.parametrize("left_handed", [False, True])
    def test_the_affine_is_chosen_as_by_itk(self, tmp_path, qform_code, sform_code, left_handed):
        data = file_bytes(tmp_path, direction=OBLIQUE * (1, 1, -1 if left_handed else 1))
        struct.pack_into("<2h", data, FORM_CODES, qform_code, sform_code)
        for row, shift in enumerate((5.0, 7.0, 11.0)):
            at = SROW + 16 * row + 12
            struct.pack_into("<f", data, at, struct.unpack_from("<f", data, at)[0] + shift)
        path = saved(tmp_path, data)
        np.testing.assert_allclose(nifti.read_nifti(path)[1], itk_affine(path), atol=1e-4)

    @pytest.mark.parametrize("unit,factor", [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001)])
    @pytest.mark.parametrize("form_codes", [(1, 0), (0, 1)])
    def test_units_of_length(self, tmp_path, unit, factor, form_codes):
        data = file_bytes(tmp_path)
        data[UNITS] = unit
        struct.pack_into("<2h", data, FORM_CODES, *form_codes)
        path = saved(tmp_path, data)
        affine = nifti.read_nifti(path)[1]
        np.testing.assert_allclose(affine, itk_affine(path), rtol=1e-5)
        np.testing.assert_allclose(affine[:3, 3], np.array([10.0, -20.0, 30.0]) * factor, rtol=1e-5)

    def test_rescaled_integers(self, tmp_path):
        data = file_bytes(tmp_path, NUMBERS.astype(np.int16))
        struct.pack_into("<2f", data, SLOPE, 0.5, -3.0)
        path = saved(tmp_path, data)
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        assert expected.max() == NUMBERS.max() * 0.5 - 3
        np.testing.assert_allclose(nifti.read_nifti(path)[0], expected, rtol=1e-6)

    @pytest.mark.parametrize("slope,intercept", [(0.0, 5.0), (np.nan, 0.0), (1.0, np.inf)])
    def test_a_scale_that_is_none_is_left_out(self, tmp_path, slope, intercept):
        data = file_bytes(tmp_path, NUMBERS.astype(np.int16))
        struct.pack_into("<2f", data, SLOPE, slope, intercept)
        np.testing.assert_array_equal(nifti.read_nifti(saved(tmp_path, data))[0], NUMBERS)

    def test_big_endian(self, tmp_path):
        data = file_bytes(tmp_path, NUMBERS.astype(np.int16))
        swapped = bytearray(data[:352] + NUMBERS.astype(">i2").tobytes())
        fields = (("i", 0, 1), ("h", DIM, 8), ("h", CODE, 2), ("f", PIXDIM, 8), ("f", OFFSET, 3))
        for letter, start, count in (*fields, ("h", FORM_CODES, 2), ("f", QUATERNION, 18)):
            struct.pack_into(f">{count}{letter}", swapped, start, *struct.unpack_from(f"<{count}{letter}", data, start))
        path = saved(tmp_path, swapped)
        array, affine = nifti.read_nifti(path)
        np.testing.assert_array_equal(array, NUMBERS)
        np.testing.assert_array_equal(array, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
        np.testing.assert_allclose(affine, itk_affine(path))

    def test_a_header_extension_is_skipped(self, tmp_path):
        data = file_bytes(tmp_path)
        struct.pack_into("<f", data, OFFSET, 352 + 32)
        extension = b"\1\0\0\0" + struct.pack("<2i", 32, 6) + b"a comment".ljust(24)
        path = saved(tmp_path, data[:348] + extension + data[352:])
        np.testing.assert_array_equal(nifti.read_nifti(path)[0], NUMBERS)

    @pytest.mark.parametrize("dim", [(4, 6, 5, 4, 1, 1, 1, 1), (7, 6, 5, 4, 1, 1, 1, 1)])
    def test_more_dimensions_of_one_are_none(self, tmp_path, dim):
        data = file_bytes(tmp_path)
        struct.pack_into("<8h", data, DIM, *dim)
        np.testing.assert_array_equal(nifti.read_nifti(saved(tmp_path, data))[0], NUMBERS)

    def test_a_name_that_lies_about_compression(self, tmp_path):
        data = file_bytes(tmp_path)
        for name, content in (("plain.nii.gz", data), ("packed.nii", gzip.compress(data))):
            np.testing.assert_array_equal(nifti.read_nifti(saved(tmp_path, content, name))[0], NUMBERS)


class TestHeader:
    @pytest.mark.parametrize(
        "dim,words",
        [
            ((4, 6, 5, 2, 2, 1, 1, 1), ("6 x 5 x 2 x 2", "choose one frame")),
            ((5, 6, 5, 2, 1, 2, 1, 1), ("6 x 5 x 2 x 1 x 2", "choose one frame")),
            ((2, 30, 4, 1, 1, 1, 1, 1), ("30 x 4", "3-D")),
            ((3, 6, -5, 4, 1, 1, 1, 1), ("not valid",)),
            ((0, 6, 5, 4, 1, 1, 1, 1), ("not valid",)),
            ((8, 6, 5, 4, 1, 1, 1, 1), ("not valid",)),
            ((3, 2000, 2000, 2000, 1, 1, 1, 1), ("2000 x 2000 x 2000", "limit")),
            ((3, 32767, 32767, 32767, 1, 1, 1, 1), ("limit",)),
            ((3, 1000, 1000, 1000, 1, 1, 1, 1), ("truncated",)),
        ],
    )
    def test_dimensions_cost_no_memory(self, tmp_path, dim, words):
        data = file_bytes(tmp_path)
        struct.pack_into("<8h", data, DIM, *dim)
        for name, content in (("image.nii", data), ("image.nii.gz", gzip.compress(data))):
            path = saved(tmp_path, content, name)
            tracemalloc.start()
            refused(path, *words)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 << 20

    @pytest.mark.parametrize("code,words", [(128, "RGB pixels"), (32, "complex pixels"), (1536, "1536"), (7, "type 7")])
    def test_types_of_voxel(self, tmp_path, code, words):
        data = file_bytes(tmp_path)
        struct.pack_into("<h", data, CODE, code)
        refused(saved(tmp_path, data), words)

    @pytest.mark.parametrize("offset", [0.0, 347.0, -1.0, 1e9, np.nan, np.inf])
    def test_where_the_voxels_start(self, tmp_path, offset):
        data = file_bytes(tmp_path)
        struct.pack_into("<f", data, OFFSET, offset)
        refused(saved(tmp_path, data), "voxels start at byte")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize(
        "form_codes,at", [((1, 0), QUATERNION), ((1, 0), PIXDIM + 4), ((0, 1), SROW), ((0, 0), PIXDIM + 4)]
    )
    def test_an_affine_that_is_not_finite(self, tmp_path, value, form_codes, at):
        data = file_bytes(tmp_path)
        struct.pack_into("<2h", data, FORM_CODES, *form_codes)
        struct.pack_into("<f", data, at, value)
        refused(saved(tmp_path, data), "affine")

    def test_an_affine_without_volume(self, tmp_path):
        data = file_bytes(tmp_path)
        struct.pack_into("<4f", data, SROW, 0, 0, 0, 0)
        refused(saved(tmp_path, data), "affine", "restore it")

    def test_foreign_files(self, tmp_path):
        refused(saved(tmp_path, b"a" * 1000), "not a single-file NIfTI-1")
        pair = file_bytes(tmp_path)
        pair[344:347] = b"ni1"
        refused(saved(tmp_path, pair), "not a single-file NIfTI-1")
        refused(tmp_path / "none.nii", "No such file")

    def test_random_damage_is_refused_or_harmless(self, tmp_path):
        """Warnings are errors here, so a number that overflows on its way is caught too."""
        rng = np.random.default_rng(1)
        original = file_bytes(tmp_path, direction=OBLIQUE)
        floats = [*range(PIXDIM, UNITS - 3, 4), *range(QUATERNION, SROW + 48, 4)]
        shorts = [*range(DIM, DIM + 16, 2), CODE, FORM_CODES, FORM_CODES + 2]
        outcomes = []
        for _ in range(600):
            data = bytearray(original)
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(0, 352)] = rng.integers(0, 256)
                struct.pack_into("<f", data, rng.choice(floats), rng.choice([np.nan, np.inf, 3e38, -3e38, 0, 1e-38, 1]))
                if rng.random() < 0.3:
                    struct.pack_into("<h", data, rng.choice(shorts), rng.choice([0, 1, -1, 32767, -32768, 2, 3]))
            try:
                array, affine = nifti.read_nifti(saved(tmp_path, data))
                assert array.ndim == 3 and np.isfinite(affine).all()
                outcomes.append(True)
            except DatasetError as problem:
                assert "image.nii" in str(problem)
                outcomes.append(False)
        assert 60 < sum(outcomes) < 540


class TestDamage:
    @pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
    def test_any_missing_tail(self, tmp_path, name):
        data = file_bytes(tmp_path)
        data = data if name == "image.nii" else gzip.compress(data)
        for kept in (0, 1, 10, 100, len(data) // 2, len(data) - 9, len(data) - 1):
            refused(saved(tmp_path, data[:kept], name), "truncated or corrupt", "Copy it again")

    @pytest.mark.parametrize("size", [9, 10, 11, 60, 119])
    def test_many_runs(self, tmp_path, monkeypatch, size):
        monkeypatch.setattr(nifti, "RUN_VOXELS", size)
        numbers = NUMBERS.astype(np.int16)
        data = file_bytes(tmp_path, numbers)
        for name, content in (("image.nii", data), ("image.nii.gz", gzip.compress(data, 1))):
            array, _ = nifti.read_nifti(saved(tmp_path, content, name))
            np.testing.assert_array_equal(array, numbers)
            refused(saved(tmp_path, content[:-20], name), "truncated or corrupt")

    def test_reading_needs_the_memory_of_the_result(self, tmp_path):
        content = gzip.compress(file_bytes(tmp_path, np.zeros((64, 128, 128), np.float64)), 1)
        path = saved(tmp_path, content, "image.nii.gz")
        tracemalloc.start()
        array, _ = nifti.read_nifti(path, lambda run: run.astype(np.int16))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert array.dtype == np.int16 and peak < array.nbytes + (4 << 20)

    def test_members_one_after_the_other_are_one_file(self, tmp_path):
        data = file_bytes(tmp_path)
        content = gzip.compress(data[:400]) + gzip.compress(data[400:])
        np.testing.assert_array_equal(nifti.read_nifti(saved(tmp_path, content, "image.nii.gz"))[0], NUMBERS)
        refused(saved(tmp_path, gzip.compress(data) + b"something", "image.nii.gz"), "corrupt")

    def test_a_wrong_checksum(self, tmp_path):
        data = bytearray(gzip.compress(file_bytes(tmp_path)))
        # All voxels decompress, and one of them could be wrong.
        data[-6] ^= 0xFF
        refused(saved(tmp_path, data, "image.nii.gz"), "corrupt")

    def test_inflated_bytes(self, tmp_path):
        content = NUMBERS.astype(np.int16).tobytes() * 500
        for packed in (zlib.compress(content), gzip.compress(content)):
            path = saved(tmp_path, b"header" + packed, "packed")
            assert nifti.inflated_bytes(path, 6, len(content)) == len(content)
            assert nifti.inflated_bytes(path, 6, len(content) + 1) == len(content)
            assert nifti.inflated_bytes(path, 5, len(content)) == 0
            assert 0 < nifti.inflated_bytes(saved(tmp_path, packed[:-200], "short"), 0, len(content)) < len(content)
        bomb = saved(tmp_path, zlib.compress(bytes(50 << 20)), "bomb")
        tracemalloc.start()
        assert nifti.inflated_bytes(bomb, 0, 50 << 20) == 50 << 20
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 << 20


def test_voxels_are_counted_by_the_header_alone(tmp_path):
    data = file_bytes(tmp_path)
    for name, content in (("plain.nii", data), ("packed.nii.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content[: len(content) * 3 // 4])
        whole = tmp_path / f"whole_{name}"
        whole.write_bytes(content)
        assert nifti.declared_voxels(whole) == nifti.read_nifti(whole)[0].size
    assert nifti.declared_voxels(tmp_path / "plain.nii") == nifti.declared_voxels(tmp_path / "whole_plain.nii")
    (tmp_path / "none.nii.gz").write_bytes(b"no image")
    assert nifti.declared_voxels(tmp_path / "none.nii.gz") is None
