//! The applications of a database object.

use std::collections::BTreeMap;
use std::thread::{self, ThreadId};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{AppEnd, Details, Error, Result, SourceLocation};
use crate::wording::name;

pub(crate) struct Registry<C: SessionConnection> {
    state: Mutex<RegistryState<C>>,
    /// An initialisation has ended.
    initialised: Condvar,
    /// The place in the program that makes the database object.
    made_at: SourceLocation,
}

struct RegistryState<C: SessionConnection> {
    /// The applications by their ids.
    apps: BTreeMap<String, App<C>>,
    /// The applications that are being initialised, each with the thread that does it.
    initialising: BTreeMap<String, ThreadId>,
    is_shut_down: bool,
}

/// The right to initialise the application of one id. Other threads wait until this is dropped.
pub(crate) struct Initialisation<'r, C: SessionConnection> {
    registry: &'r Registry<C>,
    id: &'r str,
}

impl<C: SessionConnection> Drop for Initialisation<'_, C> {
    fn drop(&mut self) {
        self.registry.state.lock().initialising.remove(self.id);
        self.registry.initialised.notify_all();
    }
}

impl<C: SessionConnection> Registry<C> {
    pub(crate) const fn new(made_at: SourceLocation) -> Self {
        let state = RegistryState { apps: BTreeMap::new(), initialising: BTreeMap::new(), is_shut_down: false };
        Self { state: Mutex::new(state), initialised: Condvar::new(), made_at }
    }

    /// The application, or the right to initialise it. Waits while another thread does that.
    pub(crate) fn get_or_initialise<'r>(&'r self, id: &'r str) -> Result<Result<App<C>, Initialisation<'r, C>>> {
        let mut state = self.lock_open(id)?;
        loop {
            if let Some(app) = state.apps.get(id) {
                return Ok(Ok(app.clone()));
            }
            match state.initialising.get(id) {
                None => {
                    state.initialising.insert(id.to_owned(), thread::current().id());
                    return Ok(Err(Initialisation { registry: self, id }));
                }
                Some(thread) if *thread == thread::current().id() => {
                    let reason = "`get_or_init_app` was called for this application by its own closure; use the \
                                  application that the closure gets";
                    return Err(Details::InvalidConfig { app: name(id), reason: reason.into() }.into());
                }
                Some(_) => self.initialised.wait(&mut state),
            }
            state.check_open(id)?;
        }
    }

    /// Removes all applications. No application can be registered from then on.
    pub(crate) fn shut_down(&self) -> Vec<App<C>> {
        let mut state = self.state.lock();
        state.is_shut_down = true;
        std::mem::take(&mut state.apps).into_values().collect()
    }

    pub(crate) fn add(&self, app: App<C>) -> Result<App<C>> {
        let mut state = self.lock_open(app.id())?;
        if state.apps.contains_key(app.id()) {
            return Err(Details::AlreadyRegistered { app: app.id().into() }.into());
        }
        state.apps.insert(app.id().into(), app.clone());
        Ok(app)
    }

    pub(crate) fn get(&self, id: &str, at: SourceLocation) -> Result<App<C>> {
        let state = self.lock_open(id)?;
        state.apps.get(id).cloned().ok_or_else(|| self.unknown(id, &state.apps, at))
    }

    pub(crate) fn remove(&self, id: &str, at: SourceLocation) -> Result<App<C>> {
        let mut state = self.state.lock();
        state.apps.remove(id).ok_or_else(|| self.unknown(id, &state.apps, at))
    }

    /// Removes this application, but no other one with the same id.
    #[cfg(feature = "testing")]
    pub(crate) fn remove_this(&self, app: &App<C>) {
        let mut state = self.state.lock();
        if state.apps.get(app.id()).is_some_and(|other| other.is_same_app(app)) {
            let removed = state.apps.remove(app.id());
            drop(state);
            drop(removed);
        }
    }

    pub(crate) fn all(&self) -> Vec<App<C>> {
        self.state.lock().apps.values().cloned().collect()
    }

    fn lock_open(&self, id: &str) -> Result<MutexGuard<'_, RegistryState<C>>> {
        let state = self.state.lock();
        state.check_open(id)?;
        Ok(state)
    }

    fn unknown(&self, id: &str, apps: &BTreeMap<String, App<C>>, at: SourceLocation) -> Error {
        // Ten ids are enough to see a misspelling; a program may have thousands.
        let mut known: Vec<String> = apps.keys().take(10).cloned().collect();
        if apps.len() > known.len() {
            known.push(format!("and {} more", apps.len() - known.len()));
        }
        let connection = std::any::type_name::<C>().rsplit("::").next().unwrap_or_default();
        let database = format!("the `Database<{connection}>` that is made at {}", self.made_at);
        Error::from(Details::UnknownApp { app: name(id), database, at, known })
    }
}

impl<C: SessionConnection> RegistryState<C> {
    fn check_open(&self, id: &str) -> Result<()> {
        match self.is_shut_down {
            true => Err(Details::Disposed { app: name(id), how: AppEnd::ShutDown }.into()),
            false => Ok(()),
        }
    }
}
