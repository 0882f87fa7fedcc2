"""Films through ffmpeg, which imageio-ffmpeg brings along: frames as bytes in, frames as bytes out.

Knows nothing of arrays or of requests.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

from vgen.types import SettingError

QUALITY = 14  # x264's constant rate factor; 18 is already called visually lossless
DEMUXERS = "mov,matroska,webm,avi"  # nothing else: a playlist in disguise could name any file or address
SCALER = "bicubic+accurate_rnd+full_chroma_int"


@dataclass(frozen=True)
class Stream:
    """The first video stream of a file, its frames upright."""

    width: int
    height: int
    length: int  # packets, which are frames but for the hidden ones of VP8
    fps: float | None


def probe(path: Path, most: int, max_pixels: int) -> Stream:
    """Size, rate and length of a film, by counting at most `most` packets; nothing is decoded. Raises SettingError."""
    options = [*_input(path, max_pixels), "-map", "0:v:0", "-c", "copy", "-frames:v", str(most), "-f", "null", "-"]
    done = subprocess.run(_command(options, "info"), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    log = done.stderr.decode(errors="replace")
    stream = re.search(r"Video: .*?, (\d+)x(\d+)[ ,].*", log)
    counted = re.findall(r"frame=\s*(\d+)", log)
    if done.returncode or stream is None or not counted:
        raise SettingError(f"cannot decode {path}: {_last_line(done.stderr)}; mend or remove it")
    width, height = int(stream[1]), int(stream[2])
    turned = re.search(r"rotation of (-?\d+)", log[stream.start() :])
    if turned and int(turned[1]) % 180:
        width, height = height, width
    rate = re.search(r"([\d.]+) fps", stream[0]) or re.search(r"([\d.]+) tbr", stream[0])
    return Stream(width, height, int(counted[-1]), float(rate[1]) if rate and float(rate[1]) > 0 else None)


def read(path: Path, stream: Stream, start: int, stride: int, count: int, max_pixels: int) -> Iterator[bytes]:
    """At most `count` RGB frames from number `start`, every `stride`th, one after another: H * W * 3 bytes each.

    Fewer where the file ends before. Raises SettingError where it is damaged.
    """
    chosen = f"select=gte(n\\,{start})*not(mod(n-{start}\\,{stride})),scale={stream.width}:{stream.height}"
    flags = ["-sws_flags", SCALER, "-fps_mode", "passthrough", "-frames:v", str(count)]
    output = ["-map", "0:v:0", "-vf", chosen, *flags, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    size, given = stream.width * stream.height * 3, 0
    with tempfile.TemporaryFile() as log:
        command = _command([*_input(path, max_pixels), *output])
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            while len(data := process.stdout.read(size)) == size:
                given += 1
                yield data
            code = process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        log.seek(0)
        said = log.read()
    if code or data or (given < count and said.strip()):
        raise SettingError(f"cannot decode {path}: {_last_line(said)}; mend or remove it")


def write_mp4(frames: Iterable[memoryview], width: int, height: int, fps: float, path: Path, comment: str = "") -> None:
    """Write RGB frames of even sides as H.264 in yuv420p, the index in front. Raises OSError where ffmpeg fails.

    Colours follow BT.709 and are marked so; without the mark players guess by the size of the frame.
    """
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:.9g}", "-i", "-"]
    colour = f"scale=out_color_matrix=bt709:out_range=tv:flags={SCALER}"
    colour += ",setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    codec = ["-c:v", "libx264", "-crf", str(QUALITY), "-pix_fmt", "yuv420p", "-vf", colour]
    with tempfile.TemporaryDirectory() as folder:
        # As a file: command lines are short, and other users can read them.
        metadata = Path(folder) / "metadata.txt"
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", comment)
        metadata.write_text(f";FFMETADATA1\ncomment={escaped}\n", encoding="utf-8")
        tags = ["-f", "ffmetadata", "-i", str(metadata), "-map", "0:v", "-map_metadata", "1"]
        options = ["-y", *source, *tags, *codec, "-movflags", "+faststart", "-f", "mp4", str(path)]
        _feed(options, frames, Path(folder) / "log")


def _feed(options: Sequence[str], frames: Iterable[memoryview], log: Path) -> None:
    """Run ffmpeg with frames as its standard input."""
    with log.open("wb") as file:
        process = subprocess.Popen(_command(options), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=file)
    assert process.stdin is not None
    try:
        for frame in frames:
            process.stdin.write(frame)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it gave up; the log says why
    except BaseException:
        process.kill()
        raise
    finally:
        code = process.wait()
    if code:
        raise OSError(f"ffmpeg could not write the video: {_last_line(log.read_bytes())}")


def _input(path: Path, max_pixels: int) -> list[str]:
    """Options that open a file of the known formats, and nothing that it may refer to."""
    limits = ["-protocol_whitelist", "file", "-format_whitelist", DEMUXERS, "-max_pixels", str(max_pixels)]
    return [*limits, "-i", str(path.resolve())]


def _command(options: Sequence[str], level: str = "error") -> list[str]:
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise SettingError("ffmpeg is missing: install imageio-ffmpeg, or name one in IMAGEIO_FFMPEG_EXE") from error
    return [program, "-hide_banner", "-nostdin", "-loglevel", level, *options]


def _last_line(log: bytes) -> str:
    """What ffmpeg said last, without the address of the part of it that spoke."""
    lines = log.decode(errors="replace").strip().splitlines() or ["ffmpeg gave no reason"]
    return re.sub(r"^\[.*?\] ", "", lines[-1]).strip()
