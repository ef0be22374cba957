//! Durations and sizes as operators write them: `"250ms"`, `"64KiB"`.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the ranges are checked before the casts"
)]

use std::time::Duration;

/// Reads `250ms`, `1.5s`, `2m`, `1h`.
///
/// # Errors
/// The cure, for a diagnostic.
pub fn duration(text: &str) -> Result<Duration, &'static str> {
    const CURE: &str = "write a number and a unit, like \"5s\"; units are ms, s, m, h";
    let (number, unit) = split(text).ok_or(CURE)?;
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(CURE),
    };
    let duration = Duration::try_from_secs_f64(number * seconds).map_err(|_| CURE)?;
    if duration > Duration::from_hours(8760) {
        return Err("write at most a year, \"8760h\"");
    }
    // Whole milliseconds, so that 0.1 s is 100 ms and not a hair more or less.
    Ok(Duration::from_millis((duration.as_secs_f64() * 1000.0).round() as u64))
}

/// Reads `64KiB`, `10kB`, `512`.
///
/// # Errors
/// The cure, for a diagnostic.
pub fn size(text: &str) -> Result<usize, &'static str> {
    const CURE: &str =
        "write a number and a unit, like \"64KiB\"; units are B, kB, MB, GB, KiB, MiB, GiB";
    let (number, unit) = split(text).ok_or(CURE)?;
    let factor = match unit {
        "" | "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(CURE),
    };
    let bytes = number * factor;
    // An f64 holds whole numbers up to 2^53 exactly.
    if bytes.fract() != 0.0 || bytes > (1u64 << 53) as f64 {
        return Err(CURE);
    }
    Ok(bytes as usize)
}

fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [
            ("250ms", 250),
            ("5s", 5_000),
            ("1.5s", 1_500),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "5", "s", "-1s", "5 x", "1e9s", "99999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("64KiB", 65_536), ("1MiB", 1 << 20), ("10kB", 10_000), ("512", 512), ("1.5KiB", 1536)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "KiB", "1.0001B", "-1", "1TB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_is_too_strange(text in "\\PC{0,20}") {
            let _ = (duration(&text), size(&text));
        }
    }
}
