"""Reading, writing, orienting and resampling, against SimpleITK, SciPy and plain geometry."""

import gzip
import itertools
import logging
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from unicon_pipeline import geometry
from unicon_pipeline.errors import DatasetError
from unicon_pipeline.geometry import Grid, Volume
from unicon_pipeline.records import from_dict, to_dict

SHAPE = (4, 5, 6)
OBLIQUE = Rotation.from_euler("xyz", [13, -21, 34], degrees=True).as_matrix()
CODES = [
    "".join(letters) for axes in itertools.permutations(("RL", "AP", "IS")) for letters in itertools.product(*axes)
]


def make_grid(shape=SHAPE, spacing=(3.0, 2.0, 1.0), origin=(10.0, -20.0, 30.0), direction=None):
    direction = np.eye(3) if direction is None else direction
    return Grid(shape, spacing, origin, tuple(float(value) for value in np.ravel(direction)))


def noise(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write_itk(path, array, grid, compressed=True):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing_zyx_mm[::-1])
    image.SetOrigin(grid.origin_xyz_mm)
    image.SetDirection(grid.direction)
    sitk.WriteImage(image, str(path), useCompression=compressed)
    return path


def nifti_bytes(tmp_path, array, grid=None):
    path = write_itk(tmp_path / "plain_for_bytes.nii", array, grid or make_grid(array.shape))
    return bytearray(path.read_bytes())


def world(grid):
    """x, y, z in mm of every voxel, (z, y, x, 3)."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape_zyx), indexing="ij"), -1)[..., ::-1]
    scaled = index * np.array(grid.spacing_zyx_mm[::-1])
    return scaled @ np.reshape(grid.direction, (3, 3)).T + np.array(grid.origin_xyz_mm)


class TestReadAgainstItk:
    @pytest.mark.parametrize("ending", geometry.IMAGE_ENDINGS)
    @pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "float32", "float64"])
    def test_voxels_and_grid(self, tmp_path, ending, dtype):
        array = (noise(seed=1) * 100 + 200).clip(0, 127).astype(dtype)
        path = write_itk(tmp_path / f"image{ending}", array, make_grid(direction=OBLIQUE))
        volume, image = geometry.read_image(path), sitk.ReadImage(str(path))
        assert volume.array_zyx.dtype == (dtype if np.dtype(dtype).itemsize <= 2 else np.float32)
        np.testing.assert_array_equal(volume.array_zyx, sitk.GetArrayFromImage(image).astype(np.float32))
        np.testing.assert_allclose(volume.grid.spacing_zyx_mm[::-1], image.GetSpacing(), rtol=1e-6)
        np.testing.assert_allclose(volume.grid.origin_xyz_mm, image.GetOrigin(), atol=1e-5)
        np.testing.assert_allclose(volume.grid.direction, image.GetDirection(), atol=1e-6)

    def test_many_threads(self, tmp_path):
        paths = [tmp_path / f"image{n}.nii.gz" for n in range(8)]
        for n, path in enumerate(paths):
            geometry.write_image(path, noise(seed=n), make_grid())
        with ThreadPoolExecutor(4) as pool:
            for n, volume in enumerate(pool.map(geometry.read_image, paths * 4)):
                np.testing.assert_array_equal(volume.array_zyx, noise(seed=n % 8))


class TestRefused:
    def refused(self, path, *words, read=geometry.read_image):
        with pytest.raises(DatasetError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize("ending", geometry.IMAGE_ENDINGS)
    @pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7, 0.99])
    def test_truncated(self, tmp_path, capfd, ending, kept):
        path = write_itk(tmp_path / f"image{ending}", noise((8, 9, 10)), make_grid((8, 9, 10)))
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        self.refused(path)
        assert capfd.readouterr().err == ""

    def test_truncated_mha_without_compression(self, tmp_path, capfd):
        path = write_itk(tmp_path / "image.mha", noise(), make_grid(), compressed=False)
        path.write_bytes(path.read_bytes()[:-8])
        self.refused(path, "truncated")
        assert capfd.readouterr().err == ""

    def test_missing_folder_and_foreign(self, tmp_path):
        self.refused(tmp_path / "none.nii.gz", "does not exist")
        self.refused(tmp_path, "folder", "dcm2niix")
        (tmp_path / "image.png").write_bytes(b"x")
        self.refused(tmp_path / "image.png", ".nii.gz")
        (tmp_path / "text.nii").write_bytes(b"a" * 1000)
        self.refused(tmp_path / "text.nii", "not a single-file NIfTI-1")

    @pytest.mark.parametrize("ending", [".mha", ".nrrd"])
    def test_four_dimensions_in_other_formats(self, tmp_path, ending):
        sitk.WriteImage(sitk.Image([6, 5, 4, 3], sitk.sitkFloat32), str(tmp_path / f"image{ending}"))
        self.refused(tmp_path / f"image{ending}", "6 x 5 x 4 x 3", "choose one frame")

    @pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd"])
    def test_colour(self, tmp_path, ending):
        image = sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True)
        sitk.WriteImage(image, str(tmp_path / f"image{ending}"))
        self.refused(tmp_path / f"image{ending}")

    def test_nan_and_infinity_are_counted(self, tmp_path):
        array = noise()
        array[0, 0, :3] = np.nan, np.inf, -np.inf
        self.refused(write_itk(tmp_path / "image.nii.gz", array, make_grid()), "3 voxels of 120")
        beyond_float32 = np.full(SHAPE, 1e300)
        self.refused(write_itk(tmp_path / "wide.nii.gz", beyond_float32, make_grid()), "120 voxels of 120")

    @pytest.mark.parametrize(
        "pointer",
        [
            "ElementDataFile = secret.raw\n",
            "ElementDataFile = LOCALsecret.raw\n",
            "Comment = ElementDataFile = LOCAL\nElementDataFile = secret.raw\n",
            "ElementDataFile: secret.raw\nElementDataFile = LOCAL\n",
            "ElementDataFile = LIST\nsecret.raw\n",
        ],
    )
    def test_meta_headers_that_point_to_other_files(self, tmp_path, capfd, pointer):
        text, voxels = self.meta_image(tmp_path)
        for name in ("secret.raw", "LOCALsecret.raw"):
            (tmp_path / name).write_bytes(voxels)
        (tmp_path / "image.mha").write_bytes(text + pointer.encode() + bytes(len(voxels)))
        self.refused(tmp_path / "image.mha", "one whole MetaImage file")
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("pointer", ["data file", "DATA FILE", "datafile"])
    @pytest.mark.parametrize("comments", [0, 20_000])
    def test_nrrd_headers_that_point_to_other_files(self, tmp_path, pointer, comments):
        (tmp_path / "secret.raw").write_bytes(noise().tobytes())
        header = "type: float\ndimension: 3\nsizes: 6 5 4\nencoding: raw\nendian: little\n"
        text = "NRRD0004\n" + "# a\n" * comments + header + f"{pointer}: secret.raw\n\n"
        (tmp_path / "image.nrrd").write_text(text)
        self.refused(tmp_path / "image.nrrd", "one whole NRRD file")

    def meta_image(self, tmp_path):
        """Header without its last line, and voxels."""
        path = write_itk(tmp_path / "whole.mha", noise(), make_grid(), compressed=False)
        text, _, voxels = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
        return text, voxels

    @pytest.mark.parametrize(
        "old,new",
        [
            (b"DimSize = 6 5 4", b"DimSize = -6 5 4"), (b"NDims = 3", b"NDims = 30"), (b"NDims = 3\n", b""),
            (b"DimSize = 6 5 4", b"DimSize = 6 5"), (b"DimSize = 6 5 4", b"DimSize = 6 5 4000000000"),
            (b"DimSize = 6 5 4", b"DimSize = 2000 2000 2000"), (b"DimSize = 6 5 4", b"DimSize = 6 5 5"),
            (b"CompressedData = False", b"CompressedData = True"),
        ],
    )  # fmt: skip
    def test_meta_headers_that_do_not_fit(self, tmp_path, capfd, old, new):
        text, voxels = self.meta_image(tmp_path)
        assert old in text
        (tmp_path / "image.mha").write_bytes(text.replace(old, new) + b"ElementDataFile = LOCAL\n" + voxels)
        self.refused(tmp_path / "image.mha")
        assert capfd.readouterr().err == ""

    def test_a_compressed_file_that_holds_too_little(self, tmp_path, capfd):
        """ITK fills up with zeros, so a short file would pass for an image with empty slices."""
        text, voxels = self.meta_image(tmp_path)
        packed = zlib.compress(voxels)
        compressed = f"CompressedData = True\nCompressedDataSize = {len(packed)}".encode()
        for slices in (b"4", b"5", b"10000000"):
            header = text.replace(b"CompressedData = False", compressed).replace(b"6 5 4", b"6 5 " + slices)
            path = tmp_path / f"image{slices.decode()}.mha"
            path.write_bytes(header + b"ElementDataFile = LOCAL\n" + packed)
        np.testing.assert_array_equal(geometry.read_image(tmp_path / "image4.mha").array_zyx, noise())
        self.refused(tmp_path / "image5.mha", "truncated", "600 bytes")
        self.refused(tmp_path / "image10000000.mha", "truncated")
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("encoding", ["raw", "gzip"])
    def test_a_nrrd_that_promises_too_much_is_not_waited_for(self, tmp_path, encoding):
        header = "type: double\ndimension: 3\nsizes: 1000 1000 1000\nendian: little\n"
        text = f"NRRD0004\n{header}encoding: {encoding}\n\n"
        (tmp_path / "image.nrrd").write_bytes(text.encode() + gzip.compress(noise().tobytes()))
        self.refused(tmp_path / "image.nrrd", "8000000000 bytes")

    def test_other_writers_spell_headers_differently(self, tmp_path):
        text, voxels = self.meta_image(tmp_path)
        text = text.replace(b" = ", b"=").replace(b"\n", b"\r\n") + b"ElementDataFile=LOCAL\r\n"
        (tmp_path / "image.mha").write_bytes(text + voxels)
        np.testing.assert_array_equal(geometry.read_image(tmp_path / "image.mha").array_zyx, noise())


class TestSkew:
    def skewed(self, tmp_path, degrees):
        data = nifti_bytes(tmp_path, noise())
        angle = np.deg2rad(degrees)
        # The z axis leans towards y: columns of the affine, in NIfTI's right, anterior, superior.
        affine = np.array(
            [[-1, 0, 0, -10], [0, -2, -3 * np.sin(angle), 20], [0, 0, 3 * np.cos(angle), 30]], dtype=np.float32
        )
        struct.pack_into("<12f", data, 280, *affine.ravel())
        path = tmp_path / "image.nii"
        path.write_bytes(data)
        return path

    def test_small_is_repaired_with_a_warning(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            grid = geometry.read_image(self.skewed(tmp_path, 0.2)).grid
        assert "0.200 degrees" in caplog.text and "image.nii" in caplog.text
        direction = np.reshape(grid.direction, (3, 3))
        np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-12)
        # The error is shared by the two axes.
        assert np.degrees(np.arccos(direction[2, 2])) == pytest.approx(0.1, abs=1e-3)

    def test_rounding_passes_in_silence(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            geometry.read_image(self.skewed(tmp_path, 0.001))
        assert caplog.text == ""

    def test_large_is_refused_with_its_angle(self, tmp_path):
        """ITK would fall back on the other, unskewed affine of the header without a word."""
        path = self.skewed(tmp_path, 12.0)
        assert sitk.ReadImage(str(path)).GetSize() == (6, 5, 4)
        with pytest.raises(DatasetError, match=r"12\.00 degrees.*gantry"):
            geometry.read_image(path)


class TestLabels:
    def written(self, tmp_path, array):
        return write_itk(tmp_path / "labels.nii.gz", array, make_grid(array.shape))

    @pytest.mark.parametrize("stored", ["uint8", "int16", "int64", "float32"])
    @pytest.mark.parametrize("top,kept", [(3, np.uint8), (256, np.int16)])
    def test_whole_numbers_are_labels_of_the_smallest_type(self, tmp_path, stored, top, kept):
        array = np.random.default_rng(0).integers(0, 4, SHAPE)
        array[1, 2, 3] = min(top, np.iinfo(stored).max) if stored != "float32" else top
        volume = geometry.read_labels(self.written(tmp_path, array.astype(stored)))
        assert volume.array_zyx.dtype == (np.uint8 if stored == "uint8" else kept)
        np.testing.assert_array_equal(volume.array_zyx, array)

    @pytest.mark.parametrize(
        "value,dtype,words",
        [
            (0.5, "float32", "0.5"), (np.nan, "float32", "nan"), (-1, "int16", "-1"), (40000, "int32", "40000"),
        ],
    )  # fmt: skip
    def test_offenders_are_listed(self, tmp_path, value, dtype, words):
        array = np.zeros(SHAPE, dtype)
        array[1, 2, 3:5] = value
        with pytest.raises(DatasetError, match=r"labels\.nii\.gz has 2 voxels that are .*" + words):
            geometry.read_labels(self.written(tmp_path, array))

    def test_an_image_in_their_place_is_recognised(self, tmp_path):
        ct = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 10)).astype(np.int16)
        with pytest.raises(DatasetError, match="looks like a CT image, not labels"):
            geometry.read_labels(self.written(tmp_path, ct))
        with pytest.raises(DatasetError, match="looks like an image, not labels"):
            geometry.read_labels(self.written(tmp_path, np.abs(noise((8, 9, 10)))))


class TestWriting:
    @pytest.mark.parametrize("top,dtype", [(255, np.uint8), (256, np.uint16), (65535, np.uint16), (70000, np.uint32)])
    def test_labels_take_the_smallest_type(self, tmp_path, top, dtype):
        array = np.zeros(SHAPE, np.int64)
        array[1, 2, 3] = top
        geometry.write_labels(tmp_path / "new" / "labels.nii.gz", array, make_grid(direction=OBLIQUE))
        back = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "new" / "labels.nii.gz")))
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, array)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["labels.nii.gz"]

    def test_there_and_back(self, tmp_path):
        grid = make_grid(origin=(123.456, -789.012, 0.001), direction=OBLIQUE)
        geometry.write_image(tmp_path / "image.nii.gz", noise(), grid)
        volume = geometry.read_image(tmp_path / "image.nii.gz")
        np.testing.assert_array_equal(volume.array_zyx, noise())
        assert geometry.grids_differ_mm(volume.grid, grid) < geometry.GRID_TOLERANCE_MM / 10

    @pytest.mark.parametrize("ending", geometry.IMAGE_ENDINGS)
    def test_a_turned_view_is_written_as_it_looks(self, tmp_path, ending):
        turned = geometry.orient(Volume(noise(), make_grid()), "SRA")
        geometry.write_image(tmp_path / f"image{ending}", turned.array_zyx, turned.grid)
        np.testing.assert_array_equal(geometry.read_image(tmp_path / f"image{ending}").array_zyx, turned.array_zyx)

    def test_what_is_no_label_map_is_refused(self, tmp_path):
        for array in (np.full(SHAPE, -1), noise()):
            with pytest.raises(DatasetError, match="integers from 0 upwards"):
                geometry.write_labels(tmp_path / "labels.nii.gz", array, make_grid())
        with pytest.raises(DatasetError, match="does not fit a grid"):
            geometry.write_labels(tmp_path / "labels.nii.gz", np.zeros((4, 5, 7), int), make_grid())
        with pytest.raises(DatasetError, match="must end in"):
            geometry.write_labels(tmp_path / "labels.png", np.zeros(SHAPE, int), make_grid())
        assert not list(tmp_path.iterdir())

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "image.nii.gz"
        geometry.write_image(path, noise(seed=1), make_grid())

        def half(_image, name, **_options):
            with open(name, "wb") as file:
                file.write(b"half")
            raise RuntimeError("no space left")

        monkeypatch.setattr(geometry.sitk, "WriteImage", half)
        with pytest.raises(DatasetError, match=r"image\.nii\.gz.*disk full"):
            geometry.write_image(path, noise(seed=2), make_grid())
        np.testing.assert_array_equal(geometry.read_image(path).array_zyx, noise(seed=1))
        assert [path.name for path in tmp_path.iterdir()] == ["image.nii.gz"]


class TestOrientation:
    @pytest.mark.parametrize("direction", [np.eye(3), OBLIQUE])
    def test_as_itk_does_it(self, direction):
        volume = Volume(noise(), make_grid(direction=direction))
        image = sitk.GetImageFromArray(volume.array_zyx)
        image.SetSpacing(volume.grid.spacing_zyx_mm[::-1])
        image.SetOrigin(volume.grid.origin_xyz_mm)
        image.SetDirection(volume.grid.direction)
        assert len(set(CODES)) == 48
        for code in CODES:
            expected = sitk.DICOMOrient(image, code)
            oriented = geometry.orient(volume, code)
            assert geometry.orientation_code(oriented.grid) == code
            np.testing.assert_array_equal(oriented.array_zyx, sitk.GetArrayFromImage(expected))
            assert np.shares_memory(oriented.array_zyx, volume.array_zyx)
            np.testing.assert_allclose(oriented.grid.spacing_zyx_mm[::-1], expected.GetSpacing())
            np.testing.assert_allclose(oriented.grid.origin_xyz_mm, expected.GetOrigin(), atol=1e-9)
            np.testing.assert_allclose(oriented.grid.direction, expected.GetDirection(), atol=1e-12)

    @pytest.mark.parametrize("turn", [(0, 0, 45), (45, 0, 0), (0, 45, 0), (45, 45, 0), (30, 60, 135), (13, -21, 34)])
    def test_undone_bit_for_bit(self, turn):
        rotation = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
        for start in CODES:
            volume = geometry.orient(Volume(noise(), make_grid(direction=rotation)), start)
            assert geometry.orientation_code(volume.grid) == start
            there = geometry.orient(volume, "LPS")
            assert geometry.orientation_code(there.grid) == "LPS"
            back = geometry.orient(there, geometry.orientation_code(volume.grid))
            np.testing.assert_array_equal(back.array_zyx, volume.array_zyx)
            assert geometry.grids_differ_mm(back.grid, volume.grid) < 1e-6

    def test_every_voxel_stays_where_it_is(self):
        grid = make_grid(direction=OBLIQUE)
        positions = world(grid)[..., 0].astype(np.float64)
        oriented = geometry.orient(Volume(positions, grid), "SRA")
        np.testing.assert_allclose(oriented.array_zyx, world(oriented.grid)[..., 0], atol=1e-9)

    @pytest.mark.parametrize("code", ["", "LP", "LPX", "LRS", "LPSA"])
    def test_no_orientation(self, code):
        with pytest.raises(ValueError, match="one letter of R/L"):
            geometry.orient(Volume(noise(), make_grid()), code)

    def test_a_grid_is_a_record(self):
        grid = make_grid(direction=OBLIQUE)
        assert from_dict(Grid, to_dict(grid), "here") == grid


class TestOntoGrid:
    TARGET = make_grid((7, 8, 9), (1.3, 0.9, 0.7), (11.0, -18.0, 31.0), OBLIQUE)

    def test_a_linear_function_of_position_is_reproduced(self):
        """Linear interpolation is exact for it, so a shift of a hundredth of a voxel would show."""
        source = make_grid((12, 14, 16), (2.0, 1.5, 1.25), (4.0, -26.0, 24.0))
        slope = np.array([0.7, -1.1, 0.4])
        moved = geometry.onto_grid(Volume((world(source) @ slope).astype(np.float32), source), self.TARGET, 99.0)
        assert moved.grid == self.TARGET and moved.array_zyx.dtype == np.float32
        np.testing.assert_allclose(moved.array_zyx, world(self.TARGET) @ slope, atol=1e-4)

    def test_as_scipy_does_it_and_fill_outside(self):
        source = make_grid((6, 7, 8), (2.0, 1.5, 1.25), (10.0, -20.0, 30.0))
        index = (np.linalg.inv(source.affine) @ np.c_[world(self.TARGET).reshape(-1, 3), np.ones(504)].T)[2::-1]
        expected = ndimage.map_coordinates(noise((6, 7, 8)).astype(float), index, order=1, mode="nearest")
        moved = geometry.onto_grid(Volume(noise((6, 7, 8)), source), self.TARGET, -1024.0).array_zyx.ravel()
        limits = np.array([[6], [7], [8]]) - 0.5
        inside = ((index > -0.49) & (index < limits - 0.01)).all(axis=0)
        outside = ((index < -0.51) | (index > limits + 0.01)).any(axis=0)
        assert inside.sum() > 50 and outside.sum() > 50
        np.testing.assert_allclose(moved[inside], expected[inside], atol=1e-4)
        assert (moved[outside] == -1024.0).all()

    def test_integers_are_not_rounded_to_integers(self):
        source = make_grid((12, 14, 16), (2.0, 1.5, 1.25), (4.0, -26.0, 24.0))
        stored = np.random.default_rng(0).integers(-1000, 1000, source.shape_zyx).astype(np.int16)[:, ::-1]
        as_float = geometry.onto_grid(Volume(stored.astype(np.float32), source), self.TARGET, -1024.0)
        moved = geometry.onto_grid(Volume(stored, source), self.TARGET, -1024.0)
        assert moved.array_zyx.dtype == np.float32 and (moved.array_zyx % 1 != 0).any()
        np.testing.assert_array_equal(moved.array_zyx, as_float.array_zyx)

    @pytest.mark.parametrize("nearest", [False, True])
    def test_slabs_give_what_the_whole_gives(self, monkeypatch, nearest):
        source = make_grid((12, 14, 16), (2.0, 1.5, 1.25), (4.0, -26.0, 24.0))
        volume = Volume(noise(source.shape_zyx), source)
        whole = geometry.onto_grid(volume, self.TARGET, -5.0, nearest).array_zyx
        monkeypatch.setattr(geometry, "_SLAB_VOXELS", 3 * 8 * 9)
        np.testing.assert_array_equal(geometry.onto_grid(volume, self.TARGET, -5.0, nearest).array_zyx, whole)

    def test_nearest_keeps_labels(self):
        labels = np.random.default_rng(0).integers(1, 5, (12, 14, 16)).astype(np.int16)
        source = make_grid((12, 14, 16), (2.0, 1.5, 1.25), (4.0, -26.0, 24.0))
        moved = geometry.onto_grid(Volume(labels, source), self.TARGET, 0, nearest=True).array_zyx
        assert moved.dtype == np.int16
        index = (np.linalg.inv(source.affine) @ np.c_[world(self.TARGET).reshape(-1, 3), np.ones(504)].T)[2::-1]
        expected = labels[tuple(np.rint(index).astype(int))]
        np.testing.assert_array_equal(moved.ravel(), expected)

    def test_a_shifted_pet_lands_within_half_a_voxel(self):
        """A hot spot at a known place in the patient, on a coarser, shifted, turned PET grid."""
        ct, place = make_grid((30, 40, 40), (3.0, 2.0, 2.0), (-40.0, -40.0, -45.0)), np.array([7.3, -4.1, 5.2])
        turned = Rotation.from_euler("z", 8, degrees=True).as_matrix()
        pet = make_grid((22, 24, 24), (4.0, 4.0, 4.0), (-43.7, -48.9, -41.3), turned)
        spot = np.exp(-((world(pet) - place) ** 2).sum(axis=-1) / (2 * 7.0**2)).astype(np.float32)
        moved = geometry.onto_grid(Volume(spot, pet), ct, 0.0)
        weights = np.where(moved.array_zyx > 0.05, moved.array_zyx, 0)[..., None]
        centre = (weights * world(ct)).sum(axis=(0, 1, 2)) / weights.sum()
        assert (np.abs(centre - place) < 0.5 * np.array(ct.spacing_zyx_mm[::-1])).all()
        assert np.linalg.norm(centre - place) < 0.2

    def test_the_same_grid_changes_nothing(self):
        volume = Volume(noise(), make_grid(direction=OBLIQUE))
        np.testing.assert_array_equal(geometry.onto_grid(volume, volume.grid, 0.0).array_zyx, noise())

    @pytest.mark.parametrize("direction", [np.eye(3), OBLIQUE])
    def test_disjoint_fields_of_view(self, direction):
        target = make_grid(direction=direction)
        step = np.reshape(direction, (3, 3))[:, 0]
        for voxels, overlap in ((5.9, True), (6.1, False), (-5.9, True), (-6.1, False)):
            source = make_grid(origin=tuple(np.array(target.origin_xyz_mm) + voxels * step), direction=direction)
            assert geometry.fields_of_view_overlap(source, target) is overlap
            if not overlap:
                with pytest.raises(DatasetError, match="do not overlap.*same patient"):
                    geometry.onto_grid(Volume(noise(), source), target, 0.0)


class TestGridsDiffer:
    def test_one_voxel(self):
        grid = make_grid(direction=OBLIQUE)
        for axis, spacing in enumerate((1.0, 2.0, 3.0)):
            origin = np.array(grid.origin_xyz_mm) + spacing * OBLIQUE[:, axis]
            shifted = make_grid(origin=tuple(origin), direction=OBLIQUE)
            assert geometry.grids_differ_mm(grid, shifted) == pytest.approx(spacing)
            assert spacing > geometry.GRID_TOLERANCE_MM

    def test_a_millionth_of_a_millimetre_passes(self):
        moved = make_grid(origin=(10.0 + 1e-6, -20.0, 30.0))
        assert 0 < geometry.grids_differ_mm(make_grid(), moved) < geometry.GRID_TOLERANCE_MM
        # The smallest voxel in use, of a micro-CT, is still told apart.
        assert geometry.GRID_TOLERANCE_MM < 0.02

    def test_rounding_is_within_the_tolerance(self):
        grid = make_grid((300, 512, 512), direction=OBLIQUE)
        rounded = make_grid((300, 512, 512), direction=(OBLIQUE + 1e-6).round(6))
        assert 0 < geometry.grids_differ_mm(grid, rounded) < geometry.GRID_TOLERANCE_MM

    def test_the_far_corner_counts(self):
        wider = make_grid(spacing=(3.0, 2.0, 1.1))
        # Corners lie half a voxel outside: 5.5 voxels from voxel 0 at the far end.
        assert geometry.grids_differ_mm(make_grid(), wider) == pytest.approx(5.5 * 0.1)

    def test_other_shapes_are_infinitely_far(self):
        assert geometry.grids_differ_mm(make_grid((4, 5, 6)), make_grid((4, 5, 7))) == float("inf")
