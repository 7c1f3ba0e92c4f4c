//! What a command works with: a client, a namespace, a place to print.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::{Color, Global};
use super::exit::Exit;
use super::output::Ui;
use super::report::{Outcome, Report};
use crate::client::{Client, LogLevel};
use crate::context::ContextFile;

/// Where a packaged node has its socket.
const SYSTEM_SOCKET: &str = "/run/krake/api.sock";
/// Where a node listens when its configuration says nothing.
const DEFAULT_SERVER: &str = "http://127.0.0.1:7443";
/// A token file has at most this many bytes.
const TOKEN_BYTES_MAX: u64 = 4096;

/// What a command works with.
#[derive(Debug)]
pub struct Session {
    /// Where and how to print.
    pub ui: Ui,
    /// The nodes.
    pub client: Client,
    /// The namespace of objects that do not say.
    pub namespace: String,
    /// Whether the namespace was asked for on the command line.
    pub namespace_fixed: bool,
}

/// Where and how to print, from the flags.
pub fn ui(global: &Global) -> Ui {
    let color = match global.color {
        Color::Auto => anstream::ColorChoice::Auto,
        Color::Always => anstream::ColorChoice::Always,
        Color::Never => anstream::ColorChoice::Never,
    };
    Ui::new(color, global.quiet, global.verbose)
}

/// The context file's path.
///
/// # Errors
/// When there is no place for it.
pub fn config_path(global: &Global) -> Outcome<PathBuf> {
    match &global.config {
        Some(path) => Ok(path.clone()),
        None => Ok(ContextFile::default_path()?),
    }
}

fn token_from(path: &Path) -> Outcome<String> {
    let failed = |reason: String| {
        Report::new(
            Exit::Denied,
            "token-file",
            format!("the token file {} cannot be used", path.display()),
        )
        .note(reason)
        .help("the founder's data directory has admin.token; whoever may read it may use it")
    };
    let metadata = std::fs::metadata(path).map_err(|error| {
        let text = error.to_string();
        failed(
            text.split(" (os error")
                .next()
                .unwrap_or_default()
                .to_lowercase(),
        )
    })?;
    if metadata.len() > TOKEN_BYTES_MAX {
        return Err(failed(format!("it has more than {TOKEN_BYTES_MAX} bytes")).into());
    }
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let token = text.trim();
    if token.is_empty() || !token.chars().all(|c| c.is_ascii_graphic()) {
        return Err(failed("it does not hold one token".to_owned()).into());
    }
    Ok(token.to_owned())
}

impl Session {
    /// From flags, environment and contexts, in this order.
    ///
    /// # Errors
    /// When one of them cannot be used.
    pub fn new(global: &Global, ui: Ui) -> Outcome<Self> {
        let named = global.config.is_some() || global.context.is_some();
        let path = match config_path(global) {
            Ok(path) => Some(path),
            Err(failure) if named => return Err(failure),
            Err(_) => None,
        };
        let file = path.as_deref().map(ContextFile::load).transpose()?;
        let (file, path) = (file.unwrap_or_default(), path.unwrap_or_default());
        let context = file
            .select(global.context.as_deref(), &path)?
            .map(|(_, context)| context);
        let servers = match context {
            _ if !global.server.is_empty() => global.server.clone(),
            Some(context) if !context.servers.is_empty() => context.servers.clone(),
            _ if Path::new(SYSTEM_SOCKET).exists() => vec![format!("unix://{SYSTEM_SOCKET}")],
            _ => vec![DEFAULT_SERVER.to_owned()],
        };
        let from_environment = std::env::var("KRAKE_TOKEN")
            .ok()
            .filter(|token| !token.is_empty());
        // The flag and KRAKE_TOKEN_FILE share a field; the token itself is the more exact wish
        // only against the context's file.
        let token = match (&global.token_file, from_environment) {
            (Some(file), _) => Some(token_from(file)?),
            (None, Some(token)) => Some(token.trim().to_owned()),
            (None, None) => context
                .and_then(|context| context.token_path(&path))
                .map(|file| token_from(&file))
                .transpose()?,
        };
        let namespace = global
            .namespace
            .clone()
            .or_else(|| context.and_then(|context| context.namespace.clone()));
        let client = Client::new(servers, token)?
            .with_timeout(global.request_timeout)
            .with_log(Arc::new(move |level, text| {
                if level == LogLevel::Notice || ui.verbose {
                    ui.note(text);
                }
            }));
        Ok(Self {
            ui,
            client,
            namespace: namespace.unwrap_or_else(|| "default".to_owned()),
            namespace_fixed: global.namespace.is_some(),
        })
    }

    /// The line under what was read: whose view it is.
    pub fn footer(&self, served_by: Option<&str>) {
        if let (true, Some(site)) = (self.ui.terminal, served_by) {
            let dim = anstyle::Style::new().dimmed();
            self.ui.note(&format!("{dim}view of {site}{dim:#}"));
        }
    }
}
