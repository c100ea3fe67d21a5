//! The bzImage: real-mode code with a header, then protected-mode code, which holds the compressed kernel
//! (Linux `Documentation/arch/x86/boot.rst`).

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::ByteValued;

use crate::BootKind;
use crate::compression::{Compression, decompress};
use crate::error::Reason;
use crate::plan::{Piece, Plan};

const HEADER: usize = 0x1f1;
const SECTOR: usize = 512;
/// Where the protected-mode code of a bzImage goes.
const LOAD_ADDRESS: u64 = 0x10_0000;
/// From the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;

pub(crate) struct Bzimage<'a> {
    /// What the image says; fields that its version does not have are zero.
    pub(crate) header: setup_header,
    /// The protected-mode code.
    code: &'a [u8],
    /// Kernel version, as the image tells it.
    release: String,
}

impl<'a> Bzimage<'a> {
    pub(crate) fn is_bzimage(bytes: &[u8]) -> bool {
        bytes.get(0x202..0x206) == Some(b"HdrS")
    }

    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Bzimage<'a>, Reason> {
        let len = bytes.len() as u64;
        let truncated = |what, end: usize| {
            let end = end as u64;
            Reason::Truncated { what, end, len }
        };
        // The header ends where the jump in front of its signature leads.
        let mut raw = [0; size_of::<setup_header>()];
        let end = 0x202 + usize::from(*bytes.get(0x201).unwrap_or(&0));
        let present = bytes.get(HEADER..end.max(0x206));
        let present = present.ok_or_else(|| truncated("the header", end))?;
        let known = present.len().min(raw.len());
        raw[..known].copy_from_slice(&present[..known]);
        let header =
            *setup_header::from_slice(&raw).ok_or_else(|| Reason::Damaged("header".to_string()))?;

        let version = header.version;
        let no = |what: &str| Err(Reason::Unsupported(what.to_string()));
        if header.boot_flag != 0xaa55 {
            return Err(Reason::Damaged("the boot sector has no signature".into()));
        }
        if version < 0x206 {
            return Err(Reason::Unsupported(format!(
                "an old kernel: boot protocol {}.{:02}, 2.06 is needed",
                version >> 8,
                version & 0xff
            )));
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return no("a zImage, which loads below 1 MiB, cannot be booted");
        }
        if header.code32_start == 0 {
            return no("this image has a 16-bit entry only, which needs a BIOS");
        }
        let setup_sectors = match header.setup_sects {
            0 => 4,
            n => usize::from(n),
        };
        let start = (setup_sectors + 1) * SECTOR;
        let rest = bytes.get(start..);
        let rest = rest.ok_or_else(|| truncated("the real-mode code", start))?;
        // In units of 16 bytes, rounded up.
        let size = header.syssize as usize * 16;
        if rest.is_empty() || rest.len() + 15 < size {
            return Err(truncated("the kernel", start + size.max(1)));
        }
        Ok(Bzimage {
            code: &rest[..rest.len().min(size.max(1))],
            release: release(bytes, header.kernel_version),
            header,
        })
    }

    pub(crate) fn description(&self) -> String {
        format!("Linux {}", self.release).trim_end().to_string()
    }

    /// The longest command line.
    pub(crate) fn append_limit(&self) -> usize {
        self.header.cmdline_size.min(0xffff) as usize
    }

    /// The address after the last of an initial RAM disk.
    pub(crate) fn initrd_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// The kernel's ELF file, from the inside of the image.
    pub(crate) fn decompress(&self, limit: u64) -> Result<(Vec<u8>, Compression), Reason> {
        let start = self.header.payload_offset as usize;
        let end = start.checked_add(self.header.payload_length as usize);
        let payload = end.and_then(|end| self.code.get(start..end));
        let payload = payload.filter(|p| !p.is_empty() && self.header.version >= 0x208);
        let payload = payload.ok_or_else(|| Reason::Unsupported("no payload".to_string()))?;
        let unknown = || Reason::Unsupported("unknown compression".to_string());
        decompress(payload, limit)?.ok_or_else(unknown)
    }

    /// Boots the image as it is.
    pub(crate) fn plan(&self) -> Result<Plan<'a>, Reason> {
        let h = &self.header;
        let (kind, entry) = if h.version >= 0x20c && h.xloadflags & XLF_KERNEL_64 != 0 {
            (BootKind::Bzimage64, LOAD_ADDRESS + ENTRY_64)
        } else {
            (BootKind::Bzimage32, h.code32_start.into())
        };
        let code_end = LOAD_ADDRESS + self.code.len() as u64;
        if !(LOAD_ADDRESS..code_end).contains(&entry) {
            return Err(Reason::Damaged("the entry is outside of the kernel".into()));
        }
        let mut plan = Plan::new(kind, entry, self.description());
        plan.pieces.push(Piece {
            data: self.code,
            address: LOAD_ADDRESS,
            len: self.code.len() as u64,
        });
        if h.version >= 0x20a {
            // The kernel first moves itself to where it runs.
            let aligned = match (h.relocatable_kernel, u64::from(h.kernel_alignment)) {
                (0, _) | (_, 0) => 0,
                (_, alignment) => LOAD_ADDRESS.next_multiple_of(alignment),
            };
            let start = aligned.max(h.pref_address);
            let end = start.checked_add(h.init_size.into());
            let end = end.ok_or_else(|| Reason::Damaged("impossible address".to_string()))?;
            plan.workspace = start..end;
        }
        plan.header = *h;
        plan.append_limit = self.append_limit();
        plan.initrd_limit = self.initrd_limit();
        Ok(plan)
    }
}

/// The first word of the version string; at most 64 printable characters.
fn release(bytes: &[u8], offset: u16) -> String {
    let text = match offset {
        0 => None,
        _ => bytes.get(usize::from(offset) + SECTOR..),
    };
    let characters = text.unwrap_or(&[]).iter().map(|b| *b as char);
    characters
        .take_while(char::is_ascii_graphic)
        .take(64)
        .collect()
}
