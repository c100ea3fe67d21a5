//! `--memory`: how much RAM a machine has.

use std::str::FromStr;

use lodger_virtio_devices::BalloonSpec;

use super::parse_size;

/// RAM, as on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that the guest has at its start.
    pub size: u64,
    /// Bytes that it can be given while it runs, if that is more.
    pub max: Option<u64>,
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Memory, String> {
        let Some((size, option)) = text.split_once(',') else {
            return Ok(Memory {
                size: parse_size(text)?,
                max: None,
            });
        };
        let max = option
            .strip_prefix("max=")
            .ok_or("memory is SIZE or SIZE,max=SIZE")?;
        let (size, max) = (parse_size(size)?, parse_size(max)?);
        match size <= max {
            true => Ok(Memory {
                size,
                max: Some(max),
            }),
            false => Err("it has more at the start than at most".into()),
        }
    }
}

impl Memory {
    /// RAM in all.
    pub fn ram(&self) -> u64 {
        self.max.unwrap_or(self.size)
    }

    /// The balloon that takes what is too much at the start.
    pub fn balloon(&self) -> BalloonSpec {
        BalloonSpec {
            start: self.max.map(|_| self.size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memories() {
        let parsed = |text: &str| {
            let memory = text.parse::<Memory>().ok()?;
            Some((
                memory.size >> 20,
                memory.ram() >> 20,
                memory.balloon().start.is_some(),
            ))
        };
        for (text, expected) in [
            ("512", Some((512, 512, false))),
            ("1G,max=4G", Some((1024, 4096, true))),
            ("1G,max=1G", Some((1024, 1024, true))),
            ("1G,max=512M", None),
            ("1G,4G", None),
            ("1G,max=", None),
            (",max=1G", None),
            ("", None),
        ] {
            assert_eq!(parsed(text), expected, "{text}");
        }
    }
}
