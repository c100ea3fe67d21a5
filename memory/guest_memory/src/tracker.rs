//! What is known of each page of guest RAM: whether it was written (dirty log), and whether an engine has
//! cached code from it (code watch).
//!
//! The code watch is the contract by which self-modifying code, modification by another vCPU and by a device's
//! DMA are all noticed: one word a page, `version << 2 | WRITE_CACHED | HAS_CODE`.
//!
//! * An engine that caches code from a page sets HAS_CODE ([`Tracker::watch_code`]) and remembers the version.
//!   The cached code is valid as long as the version is unchanged.
//! * Every write that does not go through an engine's cached write translation reports itself
//!   ([`Tracker::note_write`]): it marks the page dirty and, if it holds code, moves the version on and tells the listeners.
//! * A vCPU may cache a write translation for a page (and then write without reporting) only if
//!   [`Tracker::cache_write`] allows it, that is, only if the page holds no code. When a page with WRITE_CACHED
//!   becomes code, `watch_code` says so, and the engine must drop that translation on every vCPU before it
//!   decodes the page.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// Bytes in a page; the granule of the dirty log and of the code watch.
pub const PAGE_SIZE: u64 = 4096;

const HAS_CODE: u32 = 1;
const WRITE_CACHED: u32 = 2;
const VERSION: u32 = 4;

/// The per-page facts of one RAM region. Pages are counted from the region's start.
#[derive(Debug, Clone, Default)]
pub struct Tracker {
    pages: Arc<Pages>,
    /// Byte offset of this view within the region.
    base: usize,
}

#[derive(Default)]
struct Pages {
    dirty: Box<[AtomicU64]>,
    code: Box<[AtomicU32]>,
    listeners: Mutex<Vec<Listener>>,
}

/// Is told a page whose code was written; false: it need not be told any more.
type Listener = Box<dyn Fn(usize) -> bool + Send + Sync>;

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pages", self.code.len())
    }
}

impl Tracker {
    /// For a region of `len` bytes.
    pub fn new(len: usize) -> Tracker {
        let pages = len.div_ceil(PAGE_SIZE as usize);
        Tracker {
            pages: Arc::new(Pages {
                dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
                code: (0..pages).map(|_| AtomicU32::new(0)).collect(),
                listeners: Mutex::default(),
            }),
            base: 0,
        }
    }

    /// The version of `page`'s code; see the module documentation.
    #[inline]
    pub fn version(&self, page: usize) -> u32 {
        self.pages.code[page].load(Ordering::Acquire) & !(HAS_CODE | WRITE_CACHED)
    }

    /// The word that holds the version of `page`, for an engine that checks it in a hot path. Compare under
    /// [`Tracker::VERSION_MASK`].
    pub fn version_word(&self, page: usize) -> &AtomicU32 {
        &self.pages.code[page]
    }

    /// Which bits of the word of [`Tracker::version_word`] are the version.
    pub const VERSION_MASK: u32 = !(HAS_CODE | WRITE_CACHED);

    /// Declares that an engine caches code from `page`. Returns the version to remember and whether cached
    /// write translations of the page may exist, which must then be dropped on every vCPU before decoding.
    pub fn watch_code(&self, page: usize) -> (u32, bool) {
        let old = self.pages.code[page].fetch_or(HAS_CODE, Ordering::AcqRel);
        (old & Self::VERSION_MASK, old & WRITE_CACHED != 0)
    }

    /// Tells that no vCPU has a cached write translation of `page` any more (after `watch_code` asked, and returned
    /// `version`). Without effect if the page was written meanwhile: then a translation may have been cached again.
    pub fn writes_uncached(&self, page: usize, version: u32) {
        let _ = self.pages.code[page].compare_exchange(
            version | HAS_CODE | WRITE_CACHED,
            version | HAS_CODE,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
    }

    /// Whether `page` holds code that an engine caches.
    pub fn has_code(&self, page: usize) -> bool {
        self.pages.code[page].load(Ordering::Acquire) & HAS_CODE != 0
    }

    /// Asks to cache a write translation of `page`; marks the page dirty. False if the page holds code: then every
    /// write must be reported instead.
    pub fn cache_write(&self, page: usize) -> bool {
        self.mark_page(page);
        let word = &self.pages.code[page];
        let mut old = word.load(Ordering::Acquire);
        loop {
            if old & HAS_CODE != 0 {
                return false;
            }
            match word.compare_exchange_weak(
                old,
                old | WRITE_CACHED,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return true,
                Err(now) => old = now,
            }
        }
    }

    /// Reports that bytes of `page` have been written. Returns whether it held code.
    pub fn note_write(&self, page: usize) -> bool {
        self.mark_page(page);
        let word = &self.pages.code[page];
        let mut old = word.load(Ordering::Acquire);
        while old & HAS_CODE != 0 {
            let new = (old & !HAS_CODE).wrapping_add(VERSION);
            match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.tell_listeners(page);
                    return true;
                }
                Err(now) => old = now,
            }
        }
        false
    }

    /// Calls `listener` with every page from now on whose version moves on, from the thread that wrote, until it returns false.
    pub fn on_code_write(&self, listener: impl Fn(usize) -> bool + Send + Sync + 'static) {
        let mut listeners = self.pages.listeners.lock().expect("a listener panicked");
        listeners.push(Box::new(listener));
    }

    #[cold]
    fn tell_listeners(&self, page: usize) {
        let mut listeners = self.pages.listeners.lock().expect("a listener panicked");
        listeners.retain(|listener| listener(page));
    }

    fn mark_page(&self, page: usize) {
        let (word, bit) = (&self.pages.dirty[page / 64], 1 << (page % 64));
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Whether `page` is marked dirty.
    pub fn is_dirty(&self, page: usize) -> bool {
        let word = self.pages.dirty[page / 64].load(Ordering::Acquire);
        word >> (page % 64) & 1 != 0
    }

    /// Reads and clears the dirty bits, 64 pages a word, from the region's start.
    pub fn take_dirty(&self) -> Vec<u64> {
        let words = self.pages.dirty.iter();
        words.map(|w| w.swap(0, Ordering::AcqRel)).collect()
    }
}

impl Bitmap for Tracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let start = (self.base + offset) / PAGE_SIZE as usize;
        let end = (self.base + offset + len - 1) / PAGE_SIZE as usize;
        for page in start..=end.min(self.pages.code.len() - 1) {
            self.note_write(page);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = (self.base + offset) / PAGE_SIZE as usize;
        let word = self.pages.dirty.get(page / 64);
        word.is_some_and(|w| w.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> Tracker {
        Tracker {
            pages: Arc::clone(&self.pages),
            base: self.base + offset,
        }
    }
}

impl BitmapSlice for Tracker {}

impl WithBitmapSlice<'_> for Tracker {
    type S = Tracker;
}

impl NewBitmap for Tracker {
    fn with_len(len: usize) -> Tracker {
        Tracker::new(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reported_write_invalidates_code_once() {
        let t = Tracker::new(3 * 4096);
        let (version, shared) = t.watch_code(1);
        assert!(!shared);
        assert!(!t.cache_write(1), "a page with code takes no cached writes");
        t.mark_dirty(4096 + 100, 8);
        assert_ne!(t.version(1), version);
        assert!(!t.has_code(1));
        assert!(!t.note_write(1));
        assert!(t.cache_write(1));
        assert_eq!(
            t.watch_code(1),
            (t.version(1), true),
            "the caller must flush"
        );
        t.writes_uncached(1, version);
        assert!(t.watch_code(1).1, "an outdated answer changes nothing");
        t.writes_uncached(1, t.version(1));
        assert!(!t.watch_code(1).1);
    }

    #[test]
    fn dirty_bits_cover_ranges_and_are_taken_once() {
        let t = Tracker::new(200 * 4096);
        t.mark_dirty(63 * 4096 + 4000, 200);
        t.slice_at(128 * 4096).mark_dirty(0, 1);
        assert!(t.dirty_at(64 * 4096) && !t.dirty_at(65 * 4096));
        assert!(t.is_dirty(64) && !t.is_dirty(65));
        assert_eq!(t.take_dirty(), [1 << 63, 1, 1, 0]);
        assert_eq!(t.take_dirty(), [0; 4]);
    }
}
