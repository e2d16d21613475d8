//! Which applications a database object has.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Error, Result};

/// Application id → application.
pub(crate) struct Registry<C: SessionConnection>(RwLock<BTreeMap<String, App<C>>>);

impl<C: SessionConnection> Registry<C> {
    pub(crate) const fn new() -> Self {
        Self(RwLock::new(BTreeMap::new()))
    }

    pub(crate) fn add(&self, app: App<C>) -> Result<App<C>> {
        let mut apps = self.write();
        if apps.contains_key(app.id()) {
            return Err(Error::AlreadyRegistered { app: app.id().into() });
        }
        apps.insert(app.id().into(), app.clone());
        Ok(app)
    }

    pub(crate) fn get(&self, id: &str) -> Result<App<C>> {
        let apps = self.read();
        apps.get(id).cloned().ok_or_else(|| unknown(id, &apps))
    }

    pub(crate) fn remove(&self, id: &str) -> Result<App<C>> {
        let mut apps = self.write();
        match apps.remove(id) {
            Some(app) => Ok(app),
            None => Err(unknown(id, &apps)),
        }
    }

    /// Removes this application, and no other of its id.
    pub(crate) fn remove_this(&self, app: &App<C>) {
        let mut apps = self.write();
        if apps.get(app.id()).is_some_and(|other| other.is(app)) {
            let removed = apps.remove(app.id());
            drop(apps);
            drop(removed);
        }
    }

    pub(crate) fn all(&self) -> Vec<App<C>> {
        self.read().values().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, App<C>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<String, App<C>>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown<C: SessionConnection>(id: &str, apps: &BTreeMap<String, App<C>>) -> Error {
    // Enough to see a misspelling; a program may have thousands.
    let mut known: Vec<String> = apps.keys().take(10).cloned().collect();
    if apps.len() > known.len() {
        known.push(format!("and {} more", apps.len() - known.len()));
    }
    Error::UnknownApp { app: crate::wording::name(id), known }
}
