//! Accesses of any size and alignment to a block of 32-bit registers.

/// Fills `data` from the registers at and after `offset`; `read` gives the register at an aligned offset.
pub(crate) fn read(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u32) {
    let mut at = offset & !3;
    let mut skip = (offset & 3) as usize;
    let mut rest = data;
    while !rest.is_empty() {
        let bytes = &read(at).to_le_bytes()[skip..];
        let (part, tail) = rest.split_at_mut(bytes.len().min(rest.len()));
        part.copy_from_slice(&bytes[..part.len()]);
        (at, skip, rest) = (at + 4, 0, tail);
    }
}

/// Hands `data` on to the registers at and after `offset`: `write` gets the aligned offset, the value in its place, and which bits
/// of it were written.
pub(crate) fn write(offset: u64, data: &[u8], mut write: impl FnMut(u64, u32, u32)) {
    let mut at = offset & !3;
    let mut skip = (offset & 3) as usize;
    let mut rest = data;
    while !rest.is_empty() {
        let (part, tail) = rest.split_at((4 - skip).min(rest.len()));
        let (mut value, mut mask) = ([0; 4], [0; 4]);
        value[skip..skip + part.len()].copy_from_slice(part);
        mask[skip..skip + part.len()].fill(0xff);
        write(at, u32::from_le_bytes(value), u32::from_le_bytes(mask));
        (at, skip, rest) = (at + 4, 0, tail);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn accesses_are_split_at_register_boundaries() {
        for (offset, bytes) in [(0, 1), (0, 4), (1, 2), (3, 2), (2, 4), (0, 8), (5, 8)] {
            let pattern = |at: u64| (at as u32).wrapping_mul(0x0101_0101) ^ 0x0302_0100;
            let mut data = vec![0; bytes];
            super::read(offset, &mut data, pattern);
            let expected = |i: u64| pattern(i & !3).to_le_bytes()[(i & 3) as usize];
            for (i, byte) in (offset..).zip(&data) {
                assert_eq!(*byte, expected(i), "byte {i} of a read at {offset}");
            }
            let mut memory = [0; 16];
            super::write(offset, &data, |at, value, mask| {
                for i in 0..4 {
                    if mask.to_le_bytes()[i] == 0xff {
                        memory[at as usize + i] = value.to_le_bytes()[i];
                    }
                }
            });
            let o = offset as usize;
            assert_eq!(memory[o..o + bytes], data);
            assert_eq!(
                memory.iter().filter(|b| **b != 0).count(),
                data.iter().filter(|b| **b != 0).count()
            );
        }
    }
}
