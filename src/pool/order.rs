//! A connect that a caller has ordered of a helper thread.
//!
//! What a connect makes goes to whoever lined up first, so an order stays when its caller has been served otherwise: there are never
//! fewer orders than callers in line.

use super::budget::Share;
use super::gate::Permit;
use super::manager::ConnectFailure;
use super::sync::Mutex;

/// What a connect is made with, until it begins; then, what became of it.
pub(super) struct Order<T>(Mutex<State<T>>);

enum State<T> {
    Placed(Permit<T>, Option<Share>),
    Begun,
    Failed(ConnectFailure),
}

impl<T> Order<T> {
    pub(super) fn new(permit: Permit<T>, share: Option<Share>) -> Self {
        Self(Mutex::new(State::Placed(permit, share)))
    }

    /// For the helper thread; `None` where the order was cancelled.
    pub(super) fn begin(&self) -> Option<(Permit<T>, Option<Share>)> {
        match self.swap(State::Begun) {
            State::Placed(permit, share) => Some((permit, share)),
            State::Begun | State::Failed(_) => None,
        }
    }

    pub(super) fn fail(&self, failure: ConnectFailure) {
        self.swap(State::Failed(failure));
    }

    /// Why the connect failed, if it did.
    pub(super) fn take_failure(&self) -> Option<ConnectFailure> {
        let mut state = self.0.lock();
        match &*state {
            State::Failed(failure) => {
                let failure = failure.clone();
                *state = State::Begun;
                Some(failure)
            }
            State::Placed(..) | State::Begun => None,
        }
    }

    /// Its caller has left: what no helper thread has begun with is taken back, as all of them may hang.
    pub(super) fn cancel(&self) {
        if let Some((mut permit, _share)) = self.begin() {
            permit.disinherit();
        }
    }

    fn swap(&self, state: State<T>) -> State<T> {
        std::mem::replace(&mut *self.0.lock(), state)
    }
}
