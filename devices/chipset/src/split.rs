//! Accesses of any size and alignment to a block of registers that are `N` bytes wide.

/// Fills `data` from the registers at and after `offset`; `read` gives the register at an aligned offset.
pub(crate) fn read<const N: usize>(
    offset: u64,
    data: &mut [u8],
    mut read: impl FnMut(u64) -> [u8; N],
) {
    let mut skip = (offset % N as u64) as usize;
    let mut at = offset - skip as u64;
    let mut rest = data;
    while !rest.is_empty() {
        let bytes = &read(at)[skip..];
        let (part, tail) = rest.split_at_mut(bytes.len().min(rest.len()));
        part.copy_from_slice(&bytes[..part.len()]);
        (at, skip, rest) = (at + N as u64, 0, tail);
    }
}

/// Hands `data` on to the registers at and after `offset`: `write` gets the aligned offset, the value in its place, and
/// which bits of it were written.
pub(crate) fn write<const N: usize>(
    offset: u64,
    data: &[u8],
    mut write: impl FnMut(u64, [u8; N], [u8; N]),
) {
    let mut skip = (offset % N as u64) as usize;
    let mut at = offset - skip as u64;
    let mut rest = data;
    while !rest.is_empty() {
        let (part, tail) = rest.split_at((N - skip).min(rest.len()));
        let (mut value, mut mask) = ([0; N], [0; N]);
        value[skip..skip + part.len()].copy_from_slice(part);
        mask[skip..skip + part.len()].fill(0xff);
        write(at, value, mask);
        (at, skip, rest) = (at + N as u64, 0, tail);
    }
}

#[cfg(test)]
mod tests {
    fn check<const N: usize>() {
        for (offset, bytes) in [
            (0, 1),
            (0, 4),
            (1, 2),
            (3, 2),
            (2, 4),
            (0, 8),
            (5, 8),
            (8, 8),
        ] {
            // The register at `at` holds the bytes at + 1, at + 2, ...
            let register = |at: u64| std::array::from_fn::<u8, N, _>(|i| at as u8 + i as u8 + 1);
            let mut data = vec![0; bytes];
            super::read(offset, &mut data, register);
            let expected: Vec<u8> = (offset..).take(bytes).map(|at| at as u8 + 1).collect();
            assert_eq!(data, expected, "{bytes} bytes at {offset}");
            let mut memory = [0; 32];
            super::write(offset, &data, |at, value: [u8; N], mask| {
                for i in (0..N).filter(|&i| mask[i] == 0xff) {
                    memory[at as usize + i] = value[i];
                }
            });
            let (before, rest) = memory.split_at(offset as usize);
            assert_eq!(rest[..bytes], expected);
            assert!(before.iter().chain(&rest[bytes..]).all(|&b| b == 0));
        }
    }

    #[test]
    fn accesses_are_split_at_register_boundaries() {
        check::<4>();
        check::<8>();
    }
}
