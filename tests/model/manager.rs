//! What opens connections: here it counts them.

use std::sync::Arc;

use super::budget::Share;
use super::sync::{AtomicUsize, Mutex, Ordering, Timer};

/// A connect that failed.
#[derive(Debug, Clone)]
pub(crate) struct ConnectFailure;

/// How many connections a server has, and the most it had.
#[derive(Debug, Default)]
pub(crate) struct Server {
    open: AtomicUsize,
    most: AtomicUsize,
}

impl Server {
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    pub(crate) fn most(&self) -> usize {
        self.most.load(Ordering::SeqCst)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Control {
    pub(crate) closed: AtomicUsize,
    pub(crate) seeking: AtomicUsize,
    pub(crate) open: AtomicUsize,
}

impl Control {
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst) == 1
    }
}

/// A connection in a slot of the storage, which is a vector: it is full when there are as many as there are permits.
pub(crate) struct Stored {
    pub(crate) broken: bool,
    storage: Arc<Storage>,
    server: Arc<Server>,
    control: Arc<Control>,
    slot: usize,
    // After the counts: the share is free when the connection is closed, not before.
    _share: Option<Share>,
}

impl Stored {
    pub(super) fn open(
        storage: &Arc<Storage>,
        server: &Arc<Server>,
        control: &Arc<Control>,
        mut share: Option<Share>,
    ) -> Self {
        let slot = storage.take();
        if let Some(share) = &mut share {
            share.opened(&Arc::new(Timer));
        }
        let open = server.open.fetch_add(1, Ordering::SeqCst) + 1;
        server.most.fetch_max(open, Ordering::SeqCst);
        control.open.fetch_add(1, Ordering::SeqCst);
        let (storage, server, control) = (Arc::clone(storage), Arc::clone(server), Arc::clone(control));
        Self { broken: false, storage, server, control, slot, _share: share }
    }
}

impl Drop for Stored {
    fn drop(&mut self) {
        self.server.open.fetch_sub(1, Ordering::SeqCst);
        self.control.open.fetch_sub(1, Ordering::SeqCst);
        self.storage.put(self.slot);
    }
}

/// In the place of r2d2.
#[derive(Debug)]
pub(crate) struct Storage(Mutex<Vec<bool>>);

impl Storage {
    pub(crate) fn new(size: usize) -> Self {
        Self(Mutex::new(vec![false; size]))
    }

    fn take(&self) -> usize {
        let mut slots = self.0.lock();
        let free = slots.iter().position(|taken| !taken).expect("whoever has a permit finds room");
        slots[free] = true;
        free
    }

    fn put(&self, slot: usize) {
        self.0.lock()[slot] = false;
    }
}
