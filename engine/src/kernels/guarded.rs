//! Memory for the tests of kernels: a slice between canaries, and around these two pages that nobody may touch. A write outside the slice
//! changes a canary or faults, a read outside it finds a NaN or faults; with the slice at an end of the memory, the very next byte faults.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::{MmapMut, MmapRaw};

use super::ternary_tile::Line;

/// What lies around a slice, and in one that nobody has written yet: a NaN as f32 and in the upper half as f16, nothing that a kernel
/// writes as integers.
const CANARY: [u8; 4] = 0x7fc5_a5a5u32.to_le_bytes();

// SAFETY: 64 bytes without padding, each of which may be anything.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
unsafe impl Pod for Line {}

/// Where a slice lies between the pages that nobody may touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Right behind the first.
    Start,
    /// Right in front of the second.
    End,
    /// So many bytes behind a multiple of 64, otherwise as near to the second as can be.
    Offset(usize),
}

impl Place {
    /// Every place of a slice of `T`: all offsets within 64 bytes, and both ends.
    pub(crate) fn all<T>() -> Vec<Place> {
        let offsets = (0..64).step_by(size_of::<T>()).map(Place::Offset);
        [Place::End, Place::Start].into_iter().chain(offsets).collect()
    }

    /// One of them by a number of any size.
    pub(crate) fn any<T>(number: usize) -> Place {
        let all = Self::all::<T>();
        all[number % all.len()]
    }
}

/// A slice of its own memory, guarded. Dropping it checks the canaries.
pub(crate) struct Guarded<T: Pod> {
    map: MmapRaw,
    page: usize,
    /// The first byte of the slice.
    start: usize,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Pod> Guarded<T> {
    /// `len` elements that hold canaries.
    pub(crate) fn new(len: usize, place: Place) -> Self {
        let (page, bytes) = (page_size(), len * size_of::<T>());
        // Two times 64 bytes of slack, so that every offset has canaries on both sides.
        let readable = (bytes + 128).next_multiple_of(page);
        let map = MmapRaw::from(MmapMut::map_anon(readable + 2 * page).unwrap());
        let end = page + readable;
        let start = match place {
            Place::Start => page,
            Place::End => end - bytes,
            Place::Offset(offset) => {
                assert!(offset < 64 && offset % align_of::<T>() == 0, "an offset of the elements");
                (end - bytes - offset) / 64 * 64 + offset
            }
        };
        let guarded = Self { map, page, start, len, elements: PhantomData };
        // SAFETY: the mapping is this value's own and nobody has a reference to it; these are its readable pages.
        let inside = unsafe { std::slice::from_raw_parts_mut(guarded.map.as_mut_ptr().add(page), readable) };
        inside.chunks_exact_mut(4).for_each(|four| four.copy_from_slice(&CANARY));
        for first in [0, end] {
            // SAFETY: as above; these are whole pages of the mapping.
            unsafe { forbid(guarded.map.as_mut_ptr().add(first), page) };
        }
        guarded
    }

    /// A copy of `elements`.
    pub(crate) fn of(elements: &[T], place: Place) -> Self {
        let mut guarded = Self::new(elements.len(), place);
        guarded.copy_from_slice(elements);
        guarded
    }

    /// Checks the canaries.
    pub(crate) fn check(&self) {
        // SAFETY: the pages between the first and the last are readable, and no other reference to them lives while `self` is borrowed.
        let inside =
            unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.page), self.map.len() - 2 * self.page) };
        let (start, end) = (self.start - self.page, self.start - self.page + self.len * size_of::<T>());
        for at in (0..start).chain(end..inside.len()) {
            let beyond = if at < start { at as isize - start as isize } else { (at - end) as isize };
            let edge = if at < start { "start" } else { "end" };
            assert_eq!(inside[at], CANARY[at % 4], "a write outside the slice: byte {beyond} from its {edge}");
        }
    }
}

impl<T: Pod> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: inside the readable pages and aligned, by `new`; any bytes are a `T`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.start).cast(), self.len) }
    }
}

impl<T: Pod> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed for as long as the slice.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(self.start).cast(), self.len) }
    }
}

impl<T: Pod> Drop for Guarded<T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
    }
}

/// Moves a block of `len` bytes at `start` of `map`, aligned to `alignment`, as near to the end as it can be, and lets nobody touch the
/// pages behind it. `map` has [`spare`] bytes more than the block needs. Gives where the block starts.
pub(super) fn fence(map: &mut MmapMut, start: usize, len: usize, alignment: usize) -> usize {
    let page = page_size();
    let base = map.as_ptr() as usize;
    let fence = (base + map.len()) / page * page - page;
    let start = if alignment <= page { (fence - len) / alignment * alignment - base } else { start };
    let first = (base + start + len).next_multiple_of(page) - base;
    // SAFETY: whole pages of the mapping, which nobody else has a reference to; whoever owns it looks at the block only.
    unsafe { forbid(map.as_mut_ptr().add(first), (map.len() - first) / page * page) };
    start
}

/// See [`fence`].
pub(super) fn spare() -> usize {
    3 * page_size()
}

#[cfg(unix)]
fn page_size() -> usize {
    // SAFETY: asks the system for a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// Lets nobody touch the `len` bytes from `first` on.
///
/// # Safety
/// They are whole pages of a mapping, and nobody reads or writes them any more.
#[cfg(unix)]
unsafe fn forbid(first: *mut u8, len: usize) {
    // SAFETY: what the caller promises.
    let outcome = unsafe { libc::mprotect(first.cast(), len, libc::PROT_NONE) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}

// Elsewhere there are canaries only.
#[cfg(not(unix))]
fn page_size() -> usize {
    4096
}

#[cfg(not(unix))]
unsafe fn forbid(_: *mut u8, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn slices_lie_where_they_are_asked_for_and_hold_canaries() {
        for len in [0, 1, 5, 1024, 5000] {
            for place in Place::all::<u16>() {
                let slice = Guarded::<u16>::new(len, place);
                assert!(slice.iter().all(|x| [0xa5a5, 0x7fc5].contains(x)));
                let (start, end) = (slice.as_ptr() as usize, slice.as_ptr_range().end as usize);
                match place {
                    Place::Start => assert_eq!(start % page_size(), 0),
                    Place::End => assert_eq!(end % page_size(), 0),
                    Place::Offset(offset) => {
                        assert_eq!(start % 64, offset);
                        assert!(end.next_multiple_of(page_size()) - end < 64 || end % page_size() == 0);
                    }
                }
                assert_eq!(&*Guarded::of(&slice, Place::End), &*slice);
            }
        }
        assert!(f32::from_bits(u32::from_le_bytes(CANARY)).is_nan());
    }

    #[test]
    fn a_write_outside_the_slice_is_found() {
        for (at, found) in [(-1isize, true), (-40, true), (0, false), (6, false), (7, true), (20, true)] {
            let mut slice = Guarded::<u8>::new(7, Place::Offset(33));
            // SAFETY: within the readable pages: there are at least 33 bytes before and 24 behind.
            unsafe { *slice.as_mut_ptr().offset(at) ^= 1 };
            assert_eq!(catch_unwind(AssertUnwindSafe(|| slice.check())).is_err(), found, "{at}");
            if found {
                assert!(catch_unwind(AssertUnwindSafe(|| drop(slice))).is_err(), "dropping checks as well");
            }
        }
    }

    /// As the system tells it, where it does: an emulator may not.
    #[test]
    #[cfg(target_os = "linux")]
    fn the_pages_around_are_forbidden() {
        let access = |address: usize| {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
            maps.lines().find_map(|line| {
                let mut words = line.split(' ');
                let (first, end) = words.next()?.split_once('-')?;
                let range = usize::from_str_radix(first, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
                range.contains(&address).then(|| words.next().unwrap_or_default().to_string())
            })
        };
        let (end, start) = (Guarded::<f32>::new(9, Place::End), Guarded::<f32>::new(9, Place::Start));
        let pages = super::super::Pages::zeroed(1000).unwrap();
        for outside in [end.as_ptr_range().end as usize, start.as_ptr() as usize - 1, pages.as_ptr() as usize + 1024] {
            assert!(access(outside).is_none_or(|access| access == "---p"), "{:?}", access(outside));
        }
    }
}
