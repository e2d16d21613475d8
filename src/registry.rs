//! The applications of a database object.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, ThreadId};

use parking_lot::{Condvar, Mutex};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{AppEnd, Error, Place, Result};

/// The applications by their ids.
pub(crate) struct Registry<C: SessionConnection> {
    apps: RwLock<BTreeMap<String, App<C>>>,
    /// The applications that are being initialised, each with the thread that does it.
    initialising: Mutex<BTreeMap<String, ThreadId>>,
    /// An initialisation has ended.
    initialised: Condvar,
    is_shut_down: AtomicBool,
    /// The place in the program that makes the database object.
    made_at: Place,
}

/// The right to initialise the application of one id. Other threads wait until this is dropped.
pub(crate) struct Initialisation<'r, C: SessionConnection> {
    registry: &'r Registry<C>,
    id: &'r str,
}

impl<C: SessionConnection> Drop for Initialisation<'_, C> {
    fn drop(&mut self) {
        self.registry.initialising.lock().remove(self.id);
        self.registry.initialised.notify_all();
    }
}

impl<C: SessionConnection> Registry<C> {
    pub(crate) const fn new(made_at: Place) -> Self {
        Self {
            apps: RwLock::new(BTreeMap::new()),
            initialising: Mutex::new(BTreeMap::new()),
            initialised: Condvar::new(),
            is_shut_down: AtomicBool::new(false),
            made_at,
        }
    }

    /// The application, or the right to initialise it. Waits while another thread does that.
    pub(crate) fn get_or_initialise<'r>(&'r self, id: &'r str) -> Result<Result<App<C>, Initialisation<'r, C>>> {
        let mut initialising = self.initialising.lock();
        loop {
            if let Some(app) = self.read().get(id) {
                return Ok(Ok(app.clone()));
            }
            match initialising.get(id) {
                None => {
                    initialising.insert(id.to_owned(), thread::current().id());
                    return Ok(Err(Initialisation { registry: self, id }));
                }
                Some(thread) if *thread == thread::current().id() => {
                    let reason = "`get_or_init_app` was called for this application by its own closure; use the \
                                  application that the closure gets";
                    return Err(Error::InvalidConfig { app: crate::wording::name(id), reason: reason.into() });
                }
                Some(_) => self.initialised.wait(&mut initialising),
            }
        }
    }

    /// Removes all applications. No application can be registered from then on.
    pub(crate) fn shut_down(&self) -> Vec<App<C>> {
        let mut apps = self.write();
        self.is_shut_down.store(true, Ordering::Release);
        std::mem::take(&mut *apps).into_values().collect()
    }

    pub(crate) fn add(&self, app: App<C>) -> Result<App<C>> {
        let mut apps = self.write();
        if self.is_shut_down.load(Ordering::Acquire) {
            return Err(Error::Disposed { app: app.id().into(), how: AppEnd::ShutDown });
        }
        if apps.contains_key(app.id()) {
            return Err(Error::AlreadyRegistered { app: app.id().into() });
        }
        apps.insert(app.id().into(), app.clone());
        Ok(app)
    }

    pub(crate) fn get(&self, id: &str, at: Place) -> Result<App<C>> {
        let apps = self.read();
        if self.is_shut_down.load(Ordering::Acquire) {
            return Err(Error::Disposed { app: crate::wording::name(id), how: AppEnd::ShutDown });
        }
        apps.get(id).cloned().ok_or_else(|| self.unknown(id, &apps, at))
    }

    pub(crate) fn remove(&self, id: &str, at: Place) -> Result<App<C>> {
        let mut apps = self.write();
        match apps.remove(id) {
            Some(app) => Ok(app),
            None => Err(self.unknown(id, &apps, at)),
        }
    }

    /// Removes this application, but no other one with the same id.
    #[cfg(feature = "testing")]
    pub(crate) fn remove_this(&self, app: &App<C>) {
        let mut apps = self.write();
        if apps.get(app.id()).is_some_and(|other| other.is_same_app(app)) {
            let removed = apps.remove(app.id());
            drop(apps);
            drop(removed);
        }
    }

    pub(crate) fn all(&self) -> Vec<App<C>> {
        self.read().values().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, App<C>>> {
        self.apps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<String, App<C>>> {
        self.apps.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn unknown(&self, id: &str, apps: &BTreeMap<String, App<C>>, at: Place) -> Error {
        // Ten ids are enough to see a misspelling; a program may have thousands.
        let mut known: Vec<String> = apps.keys().take(10).cloned().collect();
        if apps.len() > known.len() {
            known.push(format!("and {} more", apps.len() - known.len()));
        }
        let connection = std::any::type_name::<C>().rsplit("::").next().unwrap_or_default();
        let database = format!("the `Database<{connection}>` that is made at {}", self.made_at);
        Error::UnknownApp { app: crate::wording::name(id), database, at, known }
    }
}
