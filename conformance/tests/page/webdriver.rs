//! As much of a WebDriver client as the test of the page needs: chromedriver, one session, JSON over HTTP.

use base64::Engine as _;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

type Fault = Box<dyn std::error::Error + Send + Sync>;

/// A headless Chromium.
pub struct Browser {
    driver: Child,
    /// Kept open, so that chromedriver can go on writing.
    _output: BufReader<ChildStdout>,
    agent: ureq::Agent,
    session: String,
}

/// Why there is no browser.
pub enum Lack {
    /// It is not installed.
    NotInstalled(String),
    /// It is, and does not work.
    Broken(Fault),
}

impl<E: Into<Fault>> From<E> for Lack {
    fn from(error: E) -> Self {
        Self::Broken(error.into())
    }
}

impl Browser {
    /// Starts chromedriver on a free port, and with it a browser that keeps its files in `folder`.
    pub fn start(folder: &Path) -> Result<Self, Lack> {
        let mut command = Command::new("chromedriver");
        command.arg("--port=0").env("TMPDIR", folder).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut driver = match command.spawn() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Lack::NotInstalled("chromedriver is not installed".to_string()));
            }
            other => other?,
        };
        let output = driver.stdout.take().ok_or("chromedriver has no output")?;
        let mut output = BufReader::new(output);
        // It tells first the port that it was asked for, which is 0, and then the one that it has.
        let port = output.by_ref().lines().map_while(Result::ok).find_map(|line| {
            let number = line.rsplit_once("on port ")?.1.trim_end_matches('.');
            number.parse::<u16>().ok().filter(|port| *port != 0)
        });
        // No proxy may come between: the address is this machine's own.
        let config = ureq::Agent::config_builder().proxy(None).http_status_as_error(false);
        let agent = config.timeout_global(Some(Duration::from_secs(60))).build().into();
        let mut browser = Self { driver, _output: output, agent, session: String::new() };
        let base = format!("http://127.0.0.1:{}/session", port.ok_or("chromedriver told no port")?);
        let profile = folder.join("profile").display().to_string();
        let profile = format!("--user-data-dir={profile}");
        let arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", &profile];
        let capabilities = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": arguments},
        }}});
        let value = match browser.call(&base, &capabilities) {
            Err(error) if error.to_string().contains("binary") => return Err(Lack::NotInstalled(error.to_string())),
            other => other?,
        };
        browser.session = format!("{base}/{}", value["sessionId"].as_str().ok_or("no session")?);
        Ok(browser)
    }

    fn call(&self, address: &str, body: &Value) -> Result<Value, Fault> {
        let mut answer = self.agent.post(address).send_json(body)?;
        let mut answer: Value = answer.body_mut().with_config().limit(64 << 20).read_json()?;
        match answer["value"].take() {
            value if value["error"].is_string() => Err(format!("{}: {}", value["error"], value["message"]).into()),
            value => Ok(value),
        }
    }

    fn command(&self, path: &str, body: Value) -> Result<Value, Fault> {
        self.call(&format!("{}/{path}", self.session), &body)
    }

    fn devtools(&self, command: &str, parameters: Value) -> Result<Value, Fault> {
        self.command("goog/cdp/execute", json!({"cmd": command, "params": parameters}))
    }

    /// Opens an address and waits until it has loaded.
    pub fn open(&self, address: &str) -> Result<(), Fault> {
        self.command("url", json!({"url": address})).map(drop)
    }

    /// The value of a script's `return`.
    pub fn run(&self, script: &str) -> Result<Value, Fault> {
        self.command("execute/sync", json!({"script": script, "args": []}))
    }

    /// What was written to the console since this was last asked, warnings and refused requests among it.
    pub fn console(&self) -> Result<Vec<String>, Fault> {
        let entries = self.command("se/log", json!({"type": "browser"}))?;
        Ok(entries.as_array().into_iter().flatten().map(|e| format!("{}: {}", e["level"], e["message"])).collect())
    }

    /// Makes the page as wide as a screen of that many pixels, light or dark.
    pub fn screen(&self, width: u32, scheme: &str) -> Result<(), Fault> {
        let metrics = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600});
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)?;
        self.devtools("Emulation.setScrollbarsHidden", json!({"hidden": true}))?;
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.devtools("Emulation.setEmulatedMedia", features).map(drop)
    }

    /// Writes a picture of the whole page.
    pub fn picture(&self, path: &Path) -> Result<(), Fault> {
        let picture = self.devtools("Page.captureScreenshot", json!({"captureBeyondViewport": true}))?;
        let data = picture["data"].as_str().ok_or("no picture")?;
        Ok(std::fs::write(path, base64::engine::general_purpose::STANDARD.decode(data)?)?)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // A browser that is gone already needs no farewell.
        if !self.session.is_empty() {
            let _ = self.agent.delete(&self.session).call();
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
