//! Connects that callers wait for, and the shares of the budget for them.
//!
//! r2d2 tells no connect for whom it is, so callers put their shares in one place and connects take them from there.
//! Invariant: shares that lie here and connects under way are never more than callers who wait.

use super::budget::Share;
use super::sync::{Condvar, Mutex};

#[derive(Debug, Default)]
pub(super) struct Orders {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    callers: usize,
    making: usize,
    shares: Vec<Share>,
}

/// A caller who waits for a connect, as long as this lives.
pub(super) struct Order<'o>(&'o Orders);

/// What a connect was ordered with; a connect under way, as long as this lives.
pub(super) struct Making<'o>(&'o Orders);

impl Orders {
    pub(super) fn place(&self, share: Option<Share>) -> Order<'_> {
        let mut state = self.state.lock();
        state.callers += 1;
        state.shares.extend(share);
        drop(state);
        self.changed.notify_all();
        Order(self)
    }

    /// What nobody waits for: `find` is called, under the lock, only where no caller is waiting. What a connect makes is for
    /// those who ordered; whoever else took it would leave one of them without.
    pub(super) fn unless_waited_for<T>(&self, find: impl FnOnce() -> Option<T>) -> Option<T> {
        let state = self.state.lock();
        if state.callers == 0 { find() } else { None }
    }

    /// For a connect: the share it is to use, where there are shares. `None` where nobody waits for it, or who waits has to
    /// order anew. While other connects are under way for those who wait, that is not settled.
    pub(super) fn take(&self, with_share: bool) -> Option<(Making<'_>, Option<Share>)> {
        let mut state = self.state.lock();
        loop {
            if state.callers == 0 {
                return None;
            }
            let share = state.shares.pop();
            if share.is_some() || !with_share {
                state.making += 1;
                return Some((Making(self), share));
            }
            if state.making == 0 {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }
}

impl Drop for Order<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.callers -= 1;
        let excess = (state.shares.len() + state.making).saturating_sub(state.callers).min(state.shares.len());
        let rest = state.shares.len() - excess;
        let given_back = state.shares.split_off(rest);
        drop(state);
        self.0.changed.notify_all();
        // Without the lock: it wakes others.
        drop(given_back);
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.0.state.lock().making -= 1;
        self.0.changed.notify_all();
    }
}
